"""What was retrieved, for people to look at."""
