//! The network counters of a namespace, as `nstat` shows them.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;

use anyhow::{Context as _, Result};

use crate::netns::NetNs;

/// Values by name. A name is the protocol and the counter, such as `TcpRetransSegs` and
/// `TcpExtPAWSEstab`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Counters(BTreeMap<String, i64>);

impl Counters {
    pub fn of(netns: &NetNs) -> Result<Self> {
        let read = |name: &str| {
            // /proc/net would show the namespace of the process, which may not be the namespace of
            // this thread.
            let path = format!("/proc/thread-self/net/{name}");
            fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))
        };
        netns.run(|| Self::parse(&(read("snmp")? + &read("netstat")?)))?
    }

    /// The value of a counter. 0 if there is no such counter.
    pub fn get(&self, name: &str) -> i64 {
        self.0.get(name).copied().unwrap_or(0)
    }

    /// By how much each counter has grown since `before`. Counters that have not grown are left
    /// out.
    #[must_use]
    pub fn since(&self, before: &Self) -> Self {
        let grown = |(name, value): (&String, &i64)| (name.clone(), value - before.get(name));
        Self(self.0.iter().map(grown).filter(|(_, growth)| *growth != 0).collect())
    }

    /// Only the counters with these names.
    #[must_use]
    pub fn only(&self, names: &[&str]) -> Self {
        let wanted = self.0.iter().filter(|(name, _)| names.contains(&name.as_str()));
        Self(wanted.map(|(name, value)| (name.clone(), *value)).collect())
    }

    /// Whether there is no counter. For a difference: whether no counter has grown.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Reads pairs of lines: `Tcp: NAME NAME ...` and `Tcp: VALUE VALUE ...`.
    fn parse(text: &str) -> Result<Self> {
        let mut counters = BTreeMap::new();
        let mut lines = text.lines();
        while let (Some(names), Some(values)) = (lines.next(), lines.next()) {
            let (protocol, names) =
                names.split_once(": ").context("a line of counters without a protocol")?;
            let (same, values) = values.split_once(": ").context("a line of counters without a protocol")?;
            anyhow::ensure!(protocol == same, "{protocol} counters are followed by those of {same}");
            for (name, value) in names.split_whitespace().zip(values.split_whitespace()) {
                let value = value.parse().with_context(|| format!("{protocol}{name} is {value}"))?;
                counters.insert(format!("{protocol}{name}"), value);
            }
        }
        Ok(Self(counters))
    }
}

impl fmt::Display for Counters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pairs: Vec<_> = self.0.iter().map(|(name, value)| format!("{name} {value}")).collect();
        f.write_str(if pairs.is_empty() { "none" } else { "" })?;
        f.write_str(&pairs.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_of_lines_are_read_and_subtracted() {
        let text = "Tcp: MaxConn InSegs OutRsts\nTcp: -1 10 2\nTcpExt: PAWSEstab\nTcpExt: 7\n";
        let before = Counters::parse(text).unwrap();
        assert_eq!((before.get("TcpMaxConn"), before.get("TcpExtPAWSEstab"), before.get("x")), (-1, 7, 0));
        let after = Counters::parse(&text.replace(" 10 2", " 15 2")).unwrap();
        assert_eq!(after.since(&before).to_string(), "TcpInSegs 5");
        assert_eq!(after.since(&before).only(&["TcpOutRsts"]).to_string(), "none");
        assert!(Counters::parse("Tcp: A\nIp: 1\n").is_err());
    }

    #[test]
    fn a_namespace_has_its_own() {
        if !crate::require::root() {
            return;
        }
        let netns = NetNs::new("steer-t", "unit").unwrap();
        let before = Counters::of(&netns).unwrap();
        assert_eq!(before.get("TcpActiveOpens"), 0);
        assert!(netns.run(|| std::net::TcpStream::connect("127.0.0.1:9").is_err()).unwrap());
        let growth = Counters::of(&netns).unwrap().since(&before);
        assert_eq!((growth.get("TcpActiveOpens"), growth.get("TcpOutRsts")), (1, 1));
    }
}
