"""Training, data and the command line; installed as `videofactory_train`."""
