//! What Steer tells about itself: metrics and logs.

pub mod log;
mod metrics;

pub use metrics::Metrics;
