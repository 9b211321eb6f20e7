"""What a results folder holds, and how it is read and written."""
