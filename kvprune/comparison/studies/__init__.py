"""Studies: one comparison of the same policies for each of several data sets, and one table of all."""
