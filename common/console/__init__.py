"""What people see: the terminal, progress, tables, pages, other programs started from here."""
