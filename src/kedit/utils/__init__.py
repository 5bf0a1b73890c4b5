"""Tools for every other package: names that plug in, progress, processes, memory, files, linear algebra."""
