"""What happens to a running server from outside: its terminal goes, its configuration changes."""
