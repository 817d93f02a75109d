"""The node agent: it forks, watches, signals and reaps every worker process of its host (section 5.4)."""
