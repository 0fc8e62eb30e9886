"""Many runs from one file: expanded, trained and evaluated one after another, and put into one table and figure."""
