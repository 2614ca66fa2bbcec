//! The HTTP part of the endpoint: polling, and the handshake of `WebSockets`.

use std::ops::Range;

use anyhow::{Context as _, Result, bail, ensure};

use crate::head::{Partial, content_length, value};
use crate::link::Link;
use crate::ws;

/// The longest body of an answer.
const MAX_ANSWER: usize = 1 << 24;

/// The state of a connection that is not upgraded.
#[derive(Debug, Default)]
pub(super) struct Http {
    partial: Partial,
    /// How many bytes of the current request's body have not come yet.
    body_left: usize,
    /// Whether the connection closes after the current request.
    close: bool,
}

/// Answers that were made before, by the size of their body.
#[derive(Debug, Default)]
pub(super) struct Answers(Vec<(usize, Vec<u8>)>);

/// The parts of a head that matter here.
struct Request {
    kind: Kind,
    body: usize,
    close: bool,
}

enum Kind {
    /// The size of the answer's body.
    Get(usize),
    Post,
    /// The path of the upgrade.
    Upgrade(String),
}

impl Http {
    /// Answers the requests in `bytes[at]`. For an upgrade, returns the path, and `at` then begins
    /// after the head.
    pub(super) fn received(
        &mut self,
        link: &mut Link,
        bytes: &[u8],
        at: &mut Range<usize>,
        answers: &mut Answers,
    ) -> Result<Option<String>> {
        while !Range::is_empty(at) {
            if self.body_left > 0 {
                let size = at.len().min(self.body_left);
                at.start += size;
                self.body_left -= size;
                if self.body_left == 0 {
                    self.answer(link, POSTED)?;
                }
                continue;
            }
            let Some((request, size)) = self.partial.request(&bytes[at.clone()], read)? else {
                return Ok(None);
            };
            at.start += size;
            (self.body_left, self.close) = (request.body, request.close);
            match request.kind {
                Kind::Upgrade(path) => {
                    link.send(ws::SWITCHING.as_bytes())?;
                    return Ok(Some(path));
                }
                Kind::Get(size) => self.answer(link, answers.get(size))?,
                Kind::Post if request.body == 0 => self.answer(link, POSTED)?,
                Kind::Post => {}
            }
        }
        Ok(None)
    }

    fn answer(&self, link: &mut Link, answer: &[u8]) -> Result<()> {
        link.send(answer)?;
        if self.close {
            link.finish()?;
        }
        Ok(())
    }
}

impl Answers {
    fn get(&mut self, size: usize) -> &[u8] {
        let index = self.0.iter().position(|(known, _)| *known == size).unwrap_or_else(|| {
            let mut answer = format!(
                "HTTP/1.1 200 OK\r\ncontent-type: application/octet-stream\r\ncontent-length: {size}\r\n\r\n"
            )
            .into_bytes();
            answer.resize(answer.len() + size, b'x');
            self.0.push((size, answer));
            self.0.len() - 1
        });
        &self.0[index].1
    }
}

const POSTED: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-type: text/html\r\ncontent-length: 2\r\n\r\nok";

fn read(head: &httparse::Request<'_, '_>) -> Result<Request> {
    let (method, path) = (head.method.unwrap_or_default(), head.path.unwrap_or_default());
    let kind = match (value(head.headers, "sec-websocket-key"), method) {
        (Some(key), _) => {
            ensure!(key == ws::KEY.as_bytes(), "the sec-websocket-key is not the load generator's");
            Kind::Upgrade(path.to_owned())
        }
        (None, "GET") => {
            let size = path.strip_prefix("/bytes/").and_then(|size| size.parse().ok());
            Kind::Get(
                size.filter(|size| *size <= MAX_ANSWER)
                    .with_context(|| format!("there is nothing at {path}"))?,
            )
        }
        (None, "POST") => Kind::Post,
        (None, other) => bail!("the method {other} is not supported"),
    };
    let asked_to_close =
        value(head.headers, "connection").is_some_and(|it| it.eq_ignore_ascii_case(b"close"));
    Ok(Request {
        kind,
        body: content_length(head.headers)?.unwrap_or(0),
        close: asked_to_close || head.version != Some(1),
    })
}
