//! The client's side of an upgrade.

use std::io::Write as _;

use anyhow::{Result, ensure};
use httparse::Response;

use super::workload::forwarded_for;
use crate::head::value;
use crate::ws::{ACCEPT, KEY};

/// Appends the head of a request for a `WebSocket` at `path`.
pub(crate) fn ask(path: &str, number: u32, to: &mut Vec<u8>) {
    let client = forwarded_for(number);
    write!(
        to,
        "GET {path} HTTP/1.1\r\nhost: bench\r\nx-forwarded-for: {client}\r\nupgrade: websocket\r\n\
         connection: Upgrade\r\nsec-websocket-version: 13\r\nsec-websocket-key: {KEY}\r\n\r\n"
    )
    .expect("a vector takes everything");
}

/// # Errors
/// When the upgrade was refused.
pub(crate) fn check(answer: &Response<'_, '_>) -> Result<()> {
    let (code, reason) = (answer.code.unwrap_or_default(), answer.reason.unwrap_or_default());
    ensure!(code == 101, "the upgrade was answered with {code} {reason}");
    let accept = value(answer.headers, "sec-websocket-accept");
    ensure!(accept == Some(ACCEPT.as_bytes()), "the 101 does not have the right sec-websocket-accept");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::head::Partial;
    use crate::ws::SWITCHING;

    #[test]
    fn only_the_right_answer_is_believed() {
        let granted = |answer: &str| Partial::default().response(answer.as_bytes(), check).is_ok();
        assert!(granted(SWITCHING));
        assert!(!granted("HTTP/1.1 503 Service Unavailable\r\n\r\n"));
        assert!(!granted("HTTP/1.1 101 Switching Protocols\r\nsec-websocket-accept: other\r\n\r\n"));
        assert!(!granted("HTTP/1.1 101 Switching Protocols\r\n\r\n"));
    }
}
