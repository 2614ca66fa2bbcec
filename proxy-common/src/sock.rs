//! Map types of the socket splice.
