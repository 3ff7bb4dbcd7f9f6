"""One interface to all runtimes: ``open_engine(path).infer(images)``."""
