"""What crosses a process boundary: events on topics, tables in the database, and the errors both can raise."""
