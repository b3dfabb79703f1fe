"""The tables, the pictures and the page of all figures."""
