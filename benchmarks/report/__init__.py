"""Tables and plots from results files."""
