"""Who may reach the two HTTP listeners: keys, certificates, addresses. docs/security.md tells the whole."""
