//! `steer flows --summary`: how many streams the kernel carries, and why it does not carry the
//! others. Only a running process knows its relayed streams, so this command asks the process's admin
//! listener.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context as _, ensure};

use super::table::table;
use crate::splice::coverage::{Coverage, describe};

const PAGE: &str = "/flows/summary";
const ANSWER_WITHIN: Duration = Duration::from_secs(5);

pub(super) fn run(admin: SocketAddr, json: bool) -> anyhow::Result<()> {
    let body = get(admin).with_context(|| {
        format!(
            "cannot ask the admin listener {admin} for {PAGE}; start a Steer of this version, or name the address of \
             its `admin` with --admin"
        )
    })?;
    if json {
        println!("{body}");
    } else {
        print!("{}", report(&serde_json::from_str::<Vec<_>>(&body).context("the answer is not a summary")?));
    }
    Ok(())
}

/// The body of the page.
fn get(admin: SocketAddr) -> anyhow::Result<String> {
    let mut stream = TcpStream::connect_timeout(&admin, ANSWER_WITHIN)?;
    stream.set_read_timeout(Some(ANSWER_WITHIN))?;
    write!(stream, "GET {PAGE} HTTP/1.0\r\nhost: {admin}\r\nconnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("the answer is not HTTP")?;
    let status = head.lines().next().unwrap_or_default();
    ensure!(status.split(' ').nth(1) == Some("200"), "the listener answered `{status}`");
    Ok(body.to_owned())
}

fn report(clusters: &[Coverage]) -> String {
    if clusters.is_empty() {
        return "there is no stream older than a second\n\
                next: open one, and look again; `steer flows` lists what the kernel carries\n"
            .to_owned();
    }
    let heading = ["CLUSTER", "STREAMS", "SPLICED", "SHARE", "RELAYED FOR"].map(str::to_owned);
    let mut rows = vec![heading];
    rows.extend(clusters.iter().map(row));
    let mut text = table(&rows);
    for (reason, fix) in fixes(clusters) {
        text += &format!("{reason}: {fix}\n");
    }
    text += "next: /flows of the admin listener has every stream with its reason; docs/splice.md explains the reasons\n";
    text
}

fn row(coverage: &Coverage) -> [String; 5] {
    [
        coverage.cluster.clone(),
        coverage.streams.to_string(),
        coverage.spliced.to_string(),
        format!("{:.1} %", 100.0 * coverage.ratio()),
        describe(&coverage.relayed),
    ]
}

/// What can be done about the reasons, each once.
fn fixes(clusters: &[Coverage]) -> Vec<(&str, &str)> {
    let groups = clusters.iter().flat_map(|coverage| &coverage.relayed);
    let mut fixes: Vec<_> =
        groups.filter_map(|group| Some((group.reason.as_deref()?, group.fix.as_deref()?))).collect();
    fixes.sort_unstable();
    fixes.dedup();
    fixes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::splice::coverage::Relayed;

    #[test]
    fn each_cluster_has_a_row_and_each_reason_its_fix_once() {
        let relayed = |reason: Option<&str>, streams| Relayed {
            reason: reason.map(str::to_owned),
            streams,
            fix: reason.map(|reason| format!("mend {reason}")),
        };
        let clusters = [
            Coverage {
                cluster: "chat".to_owned(),
                streams: 1000,
                spliced: 875,
                relayed: vec![relayed(Some("mss"), 120), relayed(None, 5)],
            },
            Coverage {
                cluster: "sio".to_owned(),
                streams: 4,
                spliced: 3,
                relayed: vec![relayed(Some("mss"), 1)],
            },
        ];
        let expected = "\
CLUSTER  STREAMS  SPLICED  SHARE   RELAYED FOR
chat     1000     875      87.5 %  mss 120, no reason 5
sio      4        3        75.0 %  mss 1
mss: mend mss
next: /flows of the admin listener has every stream with its reason; docs/splice.md explains the reasons
";
        assert_eq!(report(&clusters), expected);
        assert!(report(&[]).contains("next: open one"));
    }
}
