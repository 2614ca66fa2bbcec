//! A new process takes over from a running one, and nobody notices.

mod bed;
mod deaths;
mod drain;
mod load;
mod refusals;
mod service;
mod under_load;
