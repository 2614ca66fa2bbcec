//! Clusters as they are now: each one immutable, versioned ring, shared by all workers.

pub mod connect;
pub mod pool;

use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;

use crate::config::{self, Config};
use crate::telemetry::Telemetry;

/// The clusters of a configuration, by [`config::ClusterIndex`].
#[derive(Debug)]
pub struct Clusters {
    clusters: Vec<Arc<Cluster>>,
}

#[derive(Debug)]
pub struct Cluster {
    pub name: Arc<str>,
    pub connect_timeout: Duration,
}

/// The endpoint that a request goes to.
#[derive(Debug, Clone)]
pub struct Pick {
    pub endpoint: Arc<config::Endpoint>,
    pub by: By,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum By {
    Hash,
    /// There was no hash key.
    Random,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("no healthy upstream")]
pub struct NoHealthyEndpoint;

impl Clusters {
    pub fn new(config: &Config, telemetry: &Telemetry) -> Self {
        let _ = (config, telemetry);
        todo!("Clusters::new")
    }

    pub fn get(&self, index: config::ClusterIndex) -> &Arc<Cluster> {
        &self.clusters[index]
    }
}

impl Cluster {
    /// The endpoint for a hash, or a random one of the ring's where there is none.
    pub fn pick(&self, hash: Option<u64>) -> Result<Pick, NoHealthyEndpoint> {
        let _ = hash;
        todo!("Cluster::pick")
    }
}
