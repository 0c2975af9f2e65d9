"""Two and four ranks train as one process, whether they replicate the masters or share them: two starts for all."""
