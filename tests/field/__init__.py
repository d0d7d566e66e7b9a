"""What people's files and machines are really like: each test is something that somebody has, or does."""
