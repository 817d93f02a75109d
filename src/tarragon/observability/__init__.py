"""What people see of a running cluster: history, dashboard, terminal view."""
