"""What drawn images are worth: features of a network, and measures of them."""
