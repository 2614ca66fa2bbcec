//! What requests are answered by: the listeners of a configuration with their routes, and its
//! clusters. Each request reads the current generation once, so a client's next request sees a new
//! configuration also on a connection that was open before.

use std::collections::HashMap;
use std::sync::Arc;

use http::HeaderValue;
use steer_policy::config;

use crate::upstream::Clusters;

/// A configuration in use. Another configuration is another generation; only the clusters' endpoints
/// change within one.
#[derive(Debug)]
pub struct Generation {
    by_name: HashMap<String, Arc<ServedListener>>,
}

/// A listener of a generation, and the clusters that its routes name.
#[derive(Debug)]
pub(super) struct ServedListener {
    pub(super) config: config::Listener,
    pub(super) clusters: Arc<Clusters>,
    /// The value of `server` in every response.
    pub(super) server_name: HeaderValue,
}

impl Generation {
    /// The listeners and the clusters of one configuration.
    pub fn new(listeners: &[config::Listener], clusters: &Arc<Clusters>) -> Self {
        let served = |listener: &config::Listener| {
            let served = ServedListener {
                config: listener.clone(),
                clusters: Arc::clone(clusters),
                // A header value by the checks of the configuration.
                server_name: HeaderValue::from_str(&listener.options.server_name)
                    .unwrap_or_else(|_invalid| HeaderValue::from_static("steer")),
            };
            (listener.name.clone(), Arc::new(served))
        };
        Self { by_name: listeners.iter().map(served).collect() }
    }

    /// `None`: the configuration does not have this listener.
    pub(super) fn listener(&self, name: &str) -> Option<Arc<ServedListener>> {
        self.by_name.get(name).cloned()
    }
}
