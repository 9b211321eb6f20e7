"""Tables, notes and plots of a comparison."""
