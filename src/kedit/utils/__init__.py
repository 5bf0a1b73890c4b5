"""What every other package may use: names that plug in, progress, processes, memory, files, linear algebra."""
