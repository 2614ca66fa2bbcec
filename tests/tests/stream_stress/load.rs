//! The clients: many planned streams at a time.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use rand::rngs::SmallRng;
use rand::{RngExt as _, SeedableRng as _};
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::backend::{Backend, Name};
use crate::plan::{Kind, Plan};
use crate::{peer, upgrade};

/// Streams at a time.
const PARALLEL: usize = 200;
/// Far above what any stream takes: one that is not done by then hangs.
const HANG: Duration = Duration::from_secs(60);
/// From the end of the client's side to that of the backend's.
const VERDICT_WITHIN: Duration = Duration::from_secs(10);

#[derive(Debug, Default)]
pub(crate) struct Outcome {
    /// One text for each stream that failed.
    pub(crate) failures: Vec<String>,
    /// What all plans together sent, if they were carried out.
    pub(crate) bytes_to_upstream: u64,
    pub(crate) bytes_to_downstream: u64,
}

/// Opens `streams` streams to `target`, behind which `backend` is.
pub(crate) async fn run(
    target: SocketAddr,
    backend: &Arc<Backend>,
    kind: Kind,
    seed: u64,
    streams: usize,
) -> Outcome {
    let mut seeds = SmallRng::seed_from_u64(seed);
    let mut outcome = Outcome::default();
    let mut running = JoinSet::new();
    let free = Arc::new(Semaphore::new(PARALLEL));
    for number in 0..streams {
        let seed = seeds.random();
        let plan = Plan::new(seed, kind);
        outcome.bytes_to_upstream += plan.client.send_bytes;
        outcome.bytes_to_downstream += plan.backend.send_bytes;
        let backend = Arc::clone(backend);
        let permit = Arc::clone(&free).acquire_owned().await;
        running.spawn(async move {
            let result = stream(target, &backend, Name::Planned { kind, seed }, &plan, number).await;
            drop(permit);
            result.map_err(|error| format!("stream {number} ({kind:?}, seed {seed:x}): {error:#}\n{plan:?}"))
        });
    }
    while let Some(result) = running.join_next().await {
        match result {
            Ok(Ok(())) => {}
            Ok(Err(failure)) => outcome.failures.push(failure),
            Err(panic) => outcome.failures.push(panic.to_string()),
        }
    }
    outcome
}

async fn stream(target: SocketAddr, backend: &Backend, name: Name, plan: &Plan, number: usize) -> Result<()> {
    let verdict = backend.verdict_on(name);
    let client = timeout(HANG, client(target, name, plan, number)).await.context("it hangs");
    let backend = timeout(VERDICT_WITHIN, verdict).await.context("it hangs");
    let client = client.and_then(|result| result).context("the client's side");
    let backend = backend.and_then(|told| told.context("no stream came")?).context("the backend's side");
    match (client, backend) {
        (Err(client), Err(backend)) => Err(anyhow::anyhow!("{client:#}; {backend:#}")),
        (client, backend) => client.and(backend),
    }
}

async fn client(target: SocketAddr, name: Name, plan: &Plan, number: usize) -> Result<()> {
    let mut stream = TcpStream::connect(target).await.context("connecting")?;
    let request = upgrade::request(&name.to_string(), target, number as u32);
    let mut early = Vec::new();
    let mut sends = plan.client.sends;
    while sends.position() < plan.early as u64 {
        let bytes = sends.peek(plan.early - sends.position() as usize);
        early.extend_from_slice(bytes);
        sends.advance(bytes.len());
    }
    if plan.early_with_request {
        stream.write_all(&[request.as_bytes(), &early].concat()).await.context("sending the request")?;
    } else {
        stream.write_all(request.as_bytes()).await.context("sending the request")?;
        stream.write_all(&early).await.context("sending before the 101")?;
    }
    let (head, surplus) = upgrade::read_head(&mut stream).await?;
    upgrade::ensure_switched(&head)?;
    peer::run(stream, &plan.client, &surplus, plan.early).await
}
