//! What Steer tells about itself: metrics, the table of live flows, logs.

pub mod flows;
pub mod log;
pub mod metrics;
pub mod stream;

use std::sync::Arc;

/// Shared by every part that counts or registers something.
#[derive(Debug)]
pub struct Telemetry {
    pub metrics: metrics::Metrics,
    pub flows: Arc<flows::Flows>,
}

impl Telemetry {
    pub fn new() -> Arc<Self> {
        let metrics = metrics::Metrics::new();
        let flows = flows::Flows::new(&metrics);
        Arc::new(Self { metrics, flows })
    }
}
