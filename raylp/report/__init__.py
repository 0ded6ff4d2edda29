"""Tables, plots and one page that shows them."""
