"""What runs there are, and where their time went."""
