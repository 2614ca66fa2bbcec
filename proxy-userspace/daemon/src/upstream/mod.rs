//! Clusters as they are now: each one immutable, versioned ring, shared by all workers.

mod cluster;
pub mod connect;
mod membership;
pub mod mss;
pub mod pool;
mod unhashed;

use std::collections::HashMap;
use std::sync::Arc;

use steer_policy::config::{self, Config};
use strum::{IntoStaticStr, VariantArray};
use thiserror::Error;

use crate::telemetry::Metrics;

pub use cluster::{Cluster, Snapshot, Table};
use unhashed::Advice;

/// The clusters of a configuration.
#[derive(Debug)]
pub struct Clusters {
    by_name: HashMap<Arc<str>, Arc<Cluster>>,
}

/// The endpoint that a request goes to.
#[derive(Debug, Clone)]
pub struct Pick {
    pub endpoint: Arc<config::Endpoint>,
    pub by: By,
}

/// `into_str` gives a metric label.
#[derive(Debug, Clone, Copy, PartialEq, Eq, IntoStaticStr, VariantArray)]
#[strum(serialize_all = "snake_case", const_into_str)]
pub enum By {
    Hash,
    /// There was no hash key.
    Random,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("no healthy upstream")]
pub struct NoHealthyEndpoint;

impl Clusters {
    pub fn new(config: &Config, metrics: &Metrics) -> Self {
        let clusters = config.clusters.iter().map(|cluster| {
            let advice = Advice::new(config, &cluster.name);
            Arc::new(Cluster::new(cluster, advice, metrics))
        });
        Self { by_name: clusters.map(|cluster| (Arc::clone(&cluster.name), cluster)).collect() }
    }

    /// The cluster of this name; `None`: the configuration does not have one.
    pub fn get(&self, name: &str) -> Option<&Arc<Cluster>> {
        self.by_name.get(name)
    }
}
