"""Makes docs/evidence.md: reads results folders, reduces them to numbers, draws and describes these."""
