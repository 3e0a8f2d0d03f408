"""What a rank says about itself while it runs, and what is made of it when one is stuck."""
