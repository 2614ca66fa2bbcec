//! HTTP requests on kept connections.

use anyhow::{Result, ensure};
use httparse::Response;

use super::tally::Tally;
use super::workload::{Connection, Next, Workload, forwarded_for};
use crate::head::{Partial, content_length};
use crate::spec::Method;

pub(super) struct Polling {
    bytes: usize,
    method: Method,
}

#[derive(Default)]
pub(super) struct State {
    /// The bytes of each request.
    request: Vec<u8>,
    partial: Partial,
    /// How many bytes of the body have not come yet.
    body_left: usize,
}

impl Polling {
    pub(super) fn new(bytes: usize, method: Method) -> Self {
        Self { bytes, method }
    }

    fn request(&self, number: u32) -> Vec<u8> {
        let (client, bytes) = (forwarded_for(number), self.bytes);
        let head = match self.method {
            Method::Get => format!("GET /bytes/{bytes} HTTP/1.1\r\n"),
            Method::Post => format!("POST / HTTP/1.1\r\ncontent-length: {bytes}\r\n"),
        };
        let mut request =
            format!("{head}host: bench\r\nx-forwarded-for: {client}\r\naccept: */*\r\n\r\n").into_bytes();
        if self.method == Method::Post {
            request.resize(request.len() + bytes, b'x');
        }
        request
    }

    /// Checks the head of an answer, and returns the size of its body.
    fn check(&self, answer: &Response<'_, '_>) -> Result<usize> {
        let expected = match self.method {
            Method::Get => self.bytes,
            Method::Post => "ok".len(),
        };
        let (code, body) = (answer.code.unwrap_or_default(), content_length(answer.headers)?);
        ensure!(code == 200 && body == Some(expected), "the answer is {code} with a body of {body:?} bytes");
        Ok(expected)
    }
}

impl Workload for Polling {
    type State = State;

    fn path(&self) -> Option<&str> {
        None
    }

    fn opened(&mut self, connection: &mut Connection<State>) -> Result<()> {
        connection.state.request = self.request(connection.number);
        connection.link.send(&connection.state.request)?;
        Ok(())
    }

    fn begin(&mut self, connection: &mut Connection<State>, now: u64) -> Result<()> {
        connection.since = now;
        connection.link.send(&connection.state.request)?;
        Ok(())
    }

    fn received(
        &mut self,
        connection: &mut Connection<State>,
        mut bytes: &[u8],
        now: u64,
        tally: &mut Tally,
    ) -> Result<Next> {
        ensure!(connection.since != 0, "an answer came without a request");
        let state = &mut connection.state;
        if state.body_left == 0 {
            let Some((body, size)) = state.partial.response(bytes, |it| self.check(it))? else {
                return Ok(Next::Wait);
            };
            state.body_left = body;
            bytes = &bytes[size..];
        }
        ensure!(bytes.len() <= state.body_left, "more bytes came than the answer has");
        state.body_left -= bytes.len();
        if state.body_left > 0 {
            return Ok(Next::Wait);
        }
        if !connection.ready {
            return Ok(Next::Ready);
        }
        tally.done(connection.since, now, self.bytes);
        connection.since = now;
        connection.link.send(&connection.state.request)?;
        Ok(Next::Wait)
    }
}
