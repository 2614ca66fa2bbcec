//! A [`Config`] as native YAML that reads back as the same configuration. Settings that have their
//! default are left out, and so are warnings and the name of a listener's only virtual host.

use std::fmt::Display;
use std::ops::RangeInclusive;
use std::time::Duration;

use super::scalar::reads_as_string;
use super::{
    Cluster, Config, Endpoint, HashFunction, HashPolicy, HashSource, HeaderSource, Health, HttpOptions,
    Instance, Keepalive, LbPolicy, Listener, PacketSplice, PathMatch, Route, SpliceMode, load_balancing,
    native, re2,
};

/// Writes `config` in the native format.
pub fn to_yaml(config: &Config) -> String {
    let mut page = Page(String::new());
    page.line(0, "listeners:");
    for (index, listener) in config.listeners.iter().enumerate() {
        page.listener(index, listener);
    }
    page.line(0, "clusters:");
    for cluster in &config.clusters {
        page.cluster(cluster);
    }
    match config.admin {
        None => page.line(0, "admin: off"),
        Some(address) if address == native::DEFAULT_ADMIN => {}
        Some(address) => page.key(0, "admin", quote(&address.to_string())),
    }
    if config.splice != SpliceMode::default() {
        page.key(0, "splice", config.splice.as_str());
    }
    if config.instance != Instance::default() {
        page.key(0, "instance", quote(config.instance.as_str()));
    }
    if config.drain_timeout != native::DEFAULT_DRAIN_TIMEOUT {
        page.key(0, "drain_timeout", duration(config.drain_timeout));
    }
    page.packet_splice(&config.packet_splice);
    page.0
}

struct Page(String);

impl Page {
    fn line(&mut self, indent: usize, text: impl Display) {
        self.0 += &format!("{:indent$}{text}\n", "");
    }

    fn key(&mut self, indent: usize, key: &str, value: impl Display) {
        self.line(indent, format_args!("{key}: {value}"));
    }

    /// The key only if the value is not the default.
    fn differs<T: PartialEq>(&mut self, key: &str, value: &T, default: &T, show: impl Fn(&T) -> String) {
        if value != default {
            self.key(2, key, show(value));
        }
    }

    fn listener(&mut self, index: usize, listener: &Listener) {
        self.key(0, "- address", quote(&listener.address.to_string()));
        if listener.name != format!("listener_{index}") {
            self.key(2, "name", quote(&listener.name));
        }
        self.options(&listener.options);
        match &listener.virtual_hosts[..] {
            [only] if only.domains == ["*"] => self.routes(2, &only.routes),
            hosts => {
                self.line(2, if hosts.is_empty() { "virtual_hosts: []" } else { "virtual_hosts:" });
                for host in hosts {
                    self.key(2, "- name", quote(&host.name));
                    self.key(4, "domains", list(host.domains.iter().map(|domain| quote(domain))));
                    self.routes(4, &host.routes);
                }
            }
        }
    }

    fn packet_splice(&mut self, settings: &PacketSplice) {
        let default = PacketSplice::default();
        if *settings == default {
            return;
        }
        let (s, d) = (settings, &default);
        self.line(0, "packet_splice:");
        self.differs("max_streams", &s.max_streams, &d.max_streams, u32::to_string);
        self.differs("source_ports", &s.source_ports, &d.source_ports, |ranges| {
            let range = |range: &RangeInclusive<u16>| format!("{}-{}", range.start(), range.end());
            list(ranges.iter().flatten().map(range))
        });
        self.differs("hand_over_after", &s.hand_over_after, &d.hand_over_after, |time| duration(*time));
        self.differs("hand_over_within", &s.hand_over_within, &d.hand_over_within, |time| duration(*time));
        self.differs("keepalive", &s.keepalive, &d.keepalive, |keepalive| {
            let Keepalive { time, interval, probes } = *keepalive;
            format!("{{ time: {}, interval: {}, probes: {probes} }}", duration(time), duration(interval))
        });
        self.differs("linger", &s.linger, &d.linger, |time| duration(*time));
        self.differs("orphan_timeout", &s.orphan_timeout, &d.orphan_timeout, |time| limit(*time));
        self.differs("mark", &s.mark, &d.mark, |mark| format!("{mark:#x}"));
        self.differs("mss", &s.mss, &d.mss, |mss| mss.unwrap_or_default().to_string());
        self.differs("agree_at_handshake", &s.agree_at_handshake, &d.agree_at_handshake, bool::to_string);
        self.differs("conntrack", &s.conntrack, &d.conntrack, |mode| mode.as_str().to_owned());
    }

    fn options(&mut self, options: &HttpOptions) {
        let default = HttpOptions::default();
        let yes = |value: &bool| value.to_string();
        let time = |value: &Option<Duration>| limit(*value);
        let (o, d) = (options, &default);
        self.differs("use_remote_address", &o.use_remote_address, &d.use_remote_address, yes);
        self.differs(
            "xff_num_trusted_hops",
            &o.xff_num_trusted_hops,
            &d.xff_num_trusted_hops,
            u32::to_string,
        );
        self.differs("skip_xff_append", &o.skip_xff_append, &d.skip_xff_append, yes);
        self.differs("via", &o.via, &d.via, |via| quote(via.as_deref().unwrap_or_default()));
        self.differs("server_name", &o.server_name, &d.server_name, |name| quote(name));
        self.differs("generate_request_id", &o.generate_request_id, &d.generate_request_id, yes);
        let (keep, keep_default) = (&o.preserve_external_request_id, &d.preserve_external_request_id);
        self.differs("preserve_external_request_id", keep, keep_default, yes);
        self.differs("header_key_format", &o.preserve_case, &d.preserve_case, |preserve_case| {
            if *preserve_case { "preserve_case" } else { "lower_case" }.to_owned()
        });
        self.differs("accept_http_10", &o.accept_http_10, &d.accept_http_10, yes);
        self.differs("upgrade_configs", &o.upgrade_websocket, &d.upgrade_websocket, |yes| upgrades(*yes));
        let (size, size_default) = (&o.max_request_headers_bytes, &d.max_request_headers_bytes);
        self.differs("max_request_headers_kb", size, size_default, |bytes| (bytes / 1024).to_string());
        let (count, count_default) = (&o.max_request_headers_count, &d.max_request_headers_count);
        self.differs("max_headers_count", count, count_default, usize::to_string);
        self.differs("request_headers_timeout", &o.request_headers_timeout, &d.request_headers_timeout, time);
        self.differs("idle_timeout", &o.idle_timeout, &d.idle_timeout, time);
        self.differs("stream_idle_timeout", &o.stream_idle_timeout, &d.stream_idle_timeout, time);
    }

    fn routes(&mut self, indent: usize, routes: &[Route]) {
        self.line(indent, if routes.is_empty() { "routes: []" } else { "routes:" });
        for route in routes {
            let (kind, path) = match &route.path {
                PathMatch::Prefix(path) => ("prefix", path),
                PathMatch::Exact(path) => ("path", path),
            };
            self.line(indent, format_args!("- match: {{ {kind}: {} }}", quote(path)));
            let indent = indent + 2;
            self.key(indent, "cluster", quote(&route.cluster));
            if let Some(timeout) = route.timeout {
                self.key(indent, "timeout", duration(timeout));
            }
            if let Some(timeout) = route.idle_timeout {
                self.key(indent, "idle_timeout", limit(timeout));
            }
            if !route.hash_policy.is_empty() {
                self.line(indent, "hash_policy:");
                for policy in &route.hash_policy {
                    self.line(indent, format_args!("- {}", hash_policy(policy)));
                }
            }
            if let Some(yes) = route.upgrade_websocket {
                self.key(indent, "upgrade_configs", upgrades(yes));
            }
        }
    }

    fn cluster(&mut self, cluster: &Cluster) {
        self.key(0, "- name", quote(&cluster.name));
        match cluster.lb_policy {
            LbPolicy::RingHash { hash_function, minimum_ring_size, maximum_ring_size } => {
                self.key(2, "lb_policy", "ring_hash");
                let mut settings = Vec::new();
                if minimum_ring_size != LbPolicy::DEFAULT_MINIMUM_RING_SIZE {
                    settings.push(format!("minimum_ring_size: {minimum_ring_size}"));
                }
                if maximum_ring_size != LbPolicy::DEFAULT_MAXIMUM_RING_SIZE {
                    settings.push(format!("maximum_ring_size: {maximum_ring_size}"));
                }
                if hash_function == HashFunction::MurmurHash2 {
                    settings.push("hash_function: murmur_hash_2".to_owned());
                }
                if !settings.is_empty() {
                    self.line(2, format_args!("ring_hash_lb_config: {{ {} }}", settings.join(", ")));
                }
            }
            LbPolicy::Maglev { table_size } => {
                self.key(2, "lb_policy", "maglev");
                if table_size != LbPolicy::DEFAULT_TABLE_SIZE {
                    self.line(2, format_args!("maglev_lb_config: {{ table_size: {table_size} }}"));
                }
            }
        }
        if cluster.connect_timeout != native::DEFAULT_CONNECT_TIMEOUT {
            self.key(2, "connect_timeout", duration(cluster.connect_timeout));
        }
        if cluster.healthy_panic_threshold != native::DEFAULT_PANIC_THRESHOLD {
            self.key(2, "healthy_panic_threshold", cluster.healthy_panic_threshold);
        }
        if !cluster.source_addresses.is_empty() {
            let addresses = cluster.source_addresses.iter().map(|address| quote(&address.to_string()));
            self.key(2, "source_addresses", list(addresses));
        }
        self.line(2, if cluster.endpoints.is_empty() { "endpoints: []" } else { "endpoints:" });
        for endpoint in &cluster.endpoints {
            self.line(2, format_args!("- {}", show_endpoint(endpoint)));
        }
    }
}

fn show_endpoint(endpoint: &Endpoint) -> String {
    let address = quote(&endpoint.address.to_string());
    let mut settings = Vec::new();
    if endpoint.weight != 1 {
        settings.push(format!("weight: {}", endpoint.weight));
    }
    if endpoint.hash_key != load_balancing::address_text(endpoint.address) {
        settings.push(format!("hash_key: {}", quote(&endpoint.hash_key)));
    }
    match endpoint.health {
        Health::Healthy => {}
        Health::Unhealthy => settings.push("health_status: unhealthy".to_owned()),
        Health::Draining => settings.push("health_status: draining".to_owned()),
        Health::Degraded => settings.push("health_status: degraded".to_owned()),
    }
    if settings.is_empty() { address } else { format!("{{ address: {address}, {} }}", settings.join(", ")) }
}

fn hash_policy(policy: &HashPolicy) -> String {
    let source = match &policy.source {
        HashSource::Header { name, rewrite } => {
            let name = match name {
                HeaderSource::Name(name) => name.as_str(),
                HeaderSource::Path => ":path",
                HeaderSource::Authority => ":authority",
                HeaderSource::Method => ":method",
                HeaderSource::Scheme => ":scheme",
            };
            let rewrite = rewrite.as_ref().map_or_else(String::new, |rewrite| {
                let (regex, text) = (quote(&re2::source(&rewrite.pattern)), quote(&rewrite.substitution));
                format!(", regex_rewrite: {{ pattern: {{ regex: {regex} }}, substitution: {text} }}")
            });
            format!("header: {{ header_name: {}{rewrite} }}", quote(name))
        }
        HashSource::Cookie(cookie) => {
            let mut settings = vec![format!("name: {}", quote(&cookie.name))];
            settings.extend(cookie.ttl.map(|ttl| format!("ttl: {}", duration(ttl))));
            settings.extend(cookie.path.as_ref().map(|path| format!("path: {}", quote(path))));
            if !cookie.attributes.is_empty() {
                let attribute = |(name, value): &(String, String)| {
                    format!("{{ name: {}, value: {} }}", quote(name), quote(value))
                };
                settings.push(format!("attributes: {}", list(cookie.attributes.iter().map(attribute))));
            }
            format!("cookie: {{ {} }}", settings.join(", "))
        }
        HashSource::SourceIp => "connection_properties: { source_ip: true }".to_owned(),
        HashSource::QueryParameter { name } => format!("query_parameter: {{ name: {} }}", quote(name)),
    };
    if policy.terminal { format!("{{ {source}, terminal: true }}") } else { source }
}

fn upgrades(websocket: bool) -> String {
    if websocket { "[websocket]".to_owned() } else { "[]".to_owned() }
}

fn list(items: impl Iterator<Item = String>) -> String {
    format!("[{}]", items.collect::<Vec<_>>().join(", "))
}

fn limit(duration_or_none: Option<Duration>) -> String {
    duration(duration_or_none.unwrap_or_default())
}

fn duration(duration: Duration) -> String {
    match (duration.as_secs(), duration.subsec_nanos()) {
        (seconds, 0) => format!("{seconds}s"),
        (0, nanoseconds) if nanoseconds % 1_000_000 == 0 => format!("{}ms", nanoseconds / 1_000_000),
        (seconds, nanoseconds) => {
            let digits = format!("{nanoseconds:09}");
            format!("{seconds}.{}s", digits.trim_end_matches('0'))
        }
    }
}

/// A string as YAML, without quotes where they are not needed.
fn quote(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_./-:".contains(&byte);
    let begins = text.bytes().next().is_some_and(|byte| byte.is_ascii_alphanumeric() || byte == b'/');
    if begins && text.bytes().all(plain) && !text.ends_with(':') && reads_as_string(text) {
        return text.to_owned();
    }
    serde_json::Value::from(text).to_string()
}
