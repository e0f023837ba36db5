"""What dbes recorded and found out, in the forms that other tools read."""
