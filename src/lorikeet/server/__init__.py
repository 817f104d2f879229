"""HTTP: routes, bodies, errors and streams. Never imports torch."""
