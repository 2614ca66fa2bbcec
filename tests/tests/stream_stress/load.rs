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
use crate::progress::{Lanes, Progress};
use crate::{peer, upgrade};

/// Much longer than any stream takes. A stream that takes longer hangs.
const HANG: Duration = Duration::from_secs(60);
/// The longest time from the end of the client's side to the end of the backend's, which may read
/// slowly. On a busy machine each of a hundred pauses takes a tenth of a second.
const VERDICT_WITHIN: Duration = HANG;

#[derive(Debug, Default)]
pub(crate) struct Outcome {
    /// One text for each stream that failed.
    pub(crate) failures: Vec<String>,
    /// The bytes of all plans together, as if all were carried out.
    pub(crate) bytes_to_upstream: u64,
    pub(crate) bytes_to_downstream: u64,
    /// The longest gap of each stream that was carried out, in order.
    pub(crate) gaps: Vec<Duration>,
    /// The retransmission timeouts of all sockets of the peers, in order.
    pub(crate) retransmission_timeouts: Vec<Duration>,
}

impl Outcome {
    pub(crate) fn longest_gap(&self) -> Duration {
        self.gaps.last().copied().unwrap_or_default()
    }
}

/// What the clients do.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Load {
    pub(crate) kind: Kind,
    /// All plans follow from the seed.
    pub(crate) seed: u64,
    pub(crate) streams: usize,
    /// How many streams are open at a time.
    pub(crate) parallel: usize,
}

/// Opens streams to `target`. `backend` is the endpoint behind `target`.
pub(crate) async fn run(target: SocketAddr, backend: &Arc<Backend>, load: Load) -> Outcome {
    let Load { kind, seed, streams, parallel } = load;
    let mut seeds = SmallRng::seed_from_u64(seed);
    let mut outcome = Outcome::default();
    let mut running = JoinSet::new();
    let free = Arc::new(Semaphore::new(parallel));
    for number in 0..streams {
        let seed = seeds.random();
        let plan = Plan::new(seed, kind);
        outcome.bytes_to_upstream += plan.client.send_bytes;
        outcome.bytes_to_downstream += plan.backend.send_bytes;
        let backend = Arc::clone(backend);
        let permit = Arc::clone(&free).acquire_owned().await;
        running.spawn(async move {
            let progress = Arc::default();
            let name = Name::Planned { kind, seed };
            let result = stream(target, &backend, name, &plan, number, &progress).await;
            drop(permit);
            let result = result.map(|()| progress);
            result.map_err(|error| format!("stream {number} ({kind:?}, seed {seed:x}): {error:#}\n{plan:?}"))
        });
    }
    while let Some(result) = running.join_next().await {
        match result {
            Ok(Ok(progress)) => {
                outcome.gaps.push(progress.longest_gap());
                outcome.retransmission_timeouts.extend(progress.retransmission_timeouts());
            }
            Ok(Err(failure)) => outcome.failures.push(failure),
            Err(panic) => outcome.failures.push(panic.to_string()),
        }
    }
    outcome.gaps.sort_unstable();
    outcome.retransmission_timeouts.sort_unstable();
    outcome
}

async fn stream(
    target: SocketAddr,
    backend: &Backend,
    name: Name,
    plan: &Plan,
    number: usize,
    progress: &Arc<Progress>,
) -> Result<()> {
    let verdict = backend.verdict_on(name, progress);
    let client = client(target, name, plan, number, progress.of_client());
    let client = timeout(HANG, client).await.context("it hangs");
    let backend = timeout(VERDICT_WITHIN, verdict).await.context("it hangs");
    let client = client.and_then(|result| result).context("the client's side");
    let backend = backend.and_then(|told| told.context("no stream came")?).context("the backend's side");
    match (client, backend) {
        (Err(client), Err(backend)) => Err(anyhow::anyhow!("{client:#}; {backend:#}")),
        (client, backend) => client.and(backend),
    }
}

async fn client(target: SocketAddr, name: Name, plan: &Plan, number: usize, lanes: Lanes<'_>) -> Result<()> {
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
    peer::run(stream, &plan.client, &surplus, plan.early, lanes).await
}
