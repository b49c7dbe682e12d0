"""The experiments of Grosse & Martens 2016, on the official archives of CIFAR-10 and SVHN."""
