//! The endpoint of all streams. It answers the upgrade, does what the stream's name says, and tells
//! the client's side the result.

use std::collections::HashMap;
use std::fmt;
use std::str::FromStr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context as _, Result};
use tokio::io::AsyncWriteExt as _;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::time::sleep;

use crate::plan::{Kind, Plan};
use crate::progress::{Lanes, Progress};
use crate::stall::{self, Sends, Stall};
use crate::{peer, upgrade};

/// What a stream does, according to the path of its request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Name {
    Planned { kind: Kind, seed: u64 },
    Stall { sends: Sends, number: u32 },
}

#[derive(Debug)]
pub(crate) struct Backend {
    awaited: Mutex<HashMap<Name, Awaited>>,
    pub(crate) stall: Stall,
}

/// What the client's side has stored here for a stream.
#[derive(Debug)]
struct Awaited {
    verdict: oneshot::Sender<Result<()>>,
    progress: Arc<Progress>,
}

impl Backend {
    /// Serves `listener` as long as the runtime lives. To be called inside a runtime.
    pub(crate) fn start(listener: std::net::TcpListener) -> Result<Arc<Self>> {
        listener.set_nonblocking(true)?;
        let listener = TcpListener::from_std(listener)?;
        let backend = Arc::new(Self { awaited: Mutex::default(), stall: Stall::new() });
        let serving = Arc::clone(&backend);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(Arc::clone(&serving).serve(stream));
            }
        });
        Ok(backend)
    }

    /// Receives the backend's verdict on the stream `name`, which has not come yet. The backend
    /// notes the stream's `progress`.
    pub(crate) fn verdict_on(&self, name: Name, progress: &Arc<Progress>) -> oneshot::Receiver<Result<()>> {
        let (verdict, receiver) = oneshot::channel();
        self.awaited().insert(name, Awaited { verdict, progress: Arc::clone(progress) });
        receiver
    }

    fn awaited(&self) -> MutexGuard<'_, HashMap<Name, Awaited>> {
        self.awaited.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn serve(self: Arc<Self>, mut stream: TcpStream) {
        // Without a name, nobody awaits a verdict. The client fails, too, because it gets no 101.
        let Ok((head, surplus)) = upgrade::read_head(&mut stream).await else { return };
        let Some(name) = upgrade::name_of(&head).and_then(|name| name.parse().ok()) else { return };
        let awaited = self.awaited().remove(&name);
        let Some(Awaited { verdict, progress }) = awaited else { return };
        let result = match name {
            Name::Planned { kind, seed } => {
                planned(stream, &surplus, &Plan::new(seed, kind), progress.of_backend()).await
            }
            Name::Stall { sends, .. } => stalled(stream, &surplus, sends, &self.stall).await,
        };
        // The client's side may have given up already.
        verdict.send(result).ok();
    }
}

async fn planned(mut stream: TcpStream, surplus: &[u8], plan: &Plan, lanes: Lanes<'_>) -> Result<()> {
    sleep(plan.delay_101).await;
    let mut response = upgrade::RESPONSE.as_bytes().to_vec();
    let mut sends = plan.backend.sends;
    while sends.position() < plan.with_101 as u64 {
        let bytes = sends.peek(plan.with_101 - sends.position() as usize);
        response.extend_from_slice(bytes);
        sends.advance(bytes.len());
    }
    stream.write_all(&response).await.context("sending the 101")?;
    peer::run(stream, &plan.backend, surplus, plan.with_101, lanes).await
}

async fn stalled(mut stream: TcpStream, surplus: &[u8], sends: Sends, stall: &Stall) -> Result<()> {
    anyhow::ensure!(surplus.is_empty(), "bytes came before the 101, but the client sent none");
    stream.write_all(upgrade::RESPONSE.as_bytes()).await.context("sending the 101")?;
    stall::run(stream, sends.backend(), &[], stall).await
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Planned { kind: Kind::Whole, seed } => write!(f, "whole-{seed:x}"),
            Self::Planned { kind: Kind::Abort, seed } => write!(f, "abort-{seed:x}"),
            Self::Stall { sends: Sends::Client, number } => write!(f, "client-{number:x}"),
            Self::Stall { sends: Sends::Backend, number } => write!(f, "backend-{number:x}"),
            Self::Stall { sends: Sends::Both, number } => write!(f, "both-{number:x}"),
        }
    }
}

impl FromStr for Name {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let (what, number) = text.split_once('-').context("no number")?;
        let seed = u64::from_str_radix(number, 16)?;
        let stall = |sends| Ok(Self::Stall { sends, number: u32::try_from(seed)? });
        match what {
            "whole" => Ok(Self::Planned { kind: Kind::Whole, seed }),
            "abort" => Ok(Self::Planned { kind: Kind::Abort, seed }),
            "client" => stall(Sends::Client),
            "backend" => stall(Sends::Backend),
            "both" => stall(Sends::Both),
            _ => anyhow::bail!("there is no kind of stream {what}"),
        }
    }
}
