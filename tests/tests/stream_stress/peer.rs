//! One peer of a planned stream, after the upgrade.

use std::io;

use anyhow::{Context as _, Result};
use rand::rngs::SmallRng;
use rand::{RngExt as _, SeedableRng as _};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::sync::Notify;
use tokio::time::sleep;

use crate::pattern::Pattern;
use crate::plan::{Abort, Side};
use crate::progress::{Lane, Lanes};

/// Sends and reads what `side` says. Fails if anything else arrives. `surplus` was read before, and
/// `sent` bytes were sent before.
pub(crate) async fn run(
    mut stream: TcpStream,
    side: &Side,
    surplus: &[u8],
    sent: usize,
    lanes: Lanes<'_>,
) -> Result<()> {
    let mut expects = side.expects;
    let mut sends = side.sends;
    expects.check(surplus).context("in the segment of the 101, or after it")?;
    lanes.receives.received(surplus.len());
    sends.advance(sent);
    lanes.sends.sends(sent);
    if let Abort::Us { after } = side.abort {
        return abort(stream, side, expects, sends, after, lanes).await;
    }
    let fin = Notify::new();
    let (read_half, write_half) = stream.split();
    let receiving = receive(read_half, side, expects, &fin, lanes.receives);
    let sending = async { send(write_half, side, sends, &fin, lanes.sends).await.context("sending") };
    if side.abort == Abort::Nobody {
        tokio::try_join!(receiving, sending)?;
        lanes.note_timeout_of(&stream);
        return Ok(());
    }
    // By chance, reading or writing reports the reset. The other one may see a FIN.
    match tokio::join!(receiving, sending) {
        (Err(error), _) | (_, Err(error)) if is_reset(&error) => Ok(()),
        (Err(error), _) | (_, Err(error)) => Err(error),
        (Ok(()), Ok(())) => anyhow::bail!("the other side's reset did not arrive"),
    }
}

async fn receive(
    mut from: ReadHalf<'_>,
    side: &Side,
    mut expects: Pattern,
    fin: &Notify,
    lane: &Lane,
) -> Result<()> {
    let mut chunk = vec![0; side.chunk];
    let mut stopped = false;
    for reads in 1_u64.. {
        lane.reads();
        let read =
            from.read(&mut chunk).await.with_context(|| format!("reading at {}", expects.position()))?;
        lane.received(read.max(1));
        if read == 0 {
            break;
        }
        expects.check(&chunk[..read])?;
        if reads % 16 == 0 && !side.read_pause.is_zero() {
            sleep(side.read_pause).await;
        }
        if !stopped && expects.position() > side.expect_bytes / 2 {
            stopped = true;
            sleep(side.read_stop).await;
        }
    }
    fin.notify_one();
    let (got, expected) = (expects.position(), side.expect_bytes);
    // The reset may be reported to the writing half. Then the reading half sees an early end.
    let cut = side.abort == Abort::Them && got < expected;
    anyhow::ensure!(got == expected || cut, "{got} bytes of {expected} arrived");
    Ok(())
}

async fn send(
    mut to: WriteHalf<'_>,
    side: &Side,
    mut sends: Pattern,
    fin: &Notify,
    lane: &Lane,
) -> io::Result<()> {
    let mut rng = SmallRng::seed_from_u64(side.seed);
    if side.waits_for_fin {
        send_up_to(&mut to, side, &mut sends, side.send_bytes / 2, &mut rng, lane).await?;
        fin.notified().await;
    }
    send_up_to(&mut to, side, &mut sends, side.send_bytes, &mut rng, lane).await?;
    lane.sends(1);
    to.shutdown().await
}

async fn send_up_to(
    to: &mut (impl AsyncWriteExt + Unpin),
    side: &Side,
    sends: &mut Pattern,
    end: u64,
    rng: &mut SmallRng,
    lane: &Lane,
) -> io::Result<()> {
    while sends.position() < end {
        let left = usize::try_from(end - sends.position()).unwrap_or(usize::MAX);
        let bytes = sends.peek(side.piece.min(left));
        lane.sends(bytes.len());
        to.write_all(bytes).await?;
        sends.advance(bytes.len());
        if !side.write_pause.is_zero() && rng.random() {
            sleep(side.write_pause).await;
        }
    }
    Ok(())
}

/// Reads until `after` bytes have come, sends half of its bytes, and resets the connection.
async fn abort(
    mut stream: TcpStream,
    side: &Side,
    mut expects: Pattern,
    mut sends: Pattern,
    after: u64,
    lanes: Lanes<'_>,
) -> Result<()> {
    let mut chunk = vec![0; side.chunk];
    while expects.position() < after {
        let read = stream.read(&mut chunk).await.context("reading before the abort")?;
        anyhow::ensure!(read > 0, "{} bytes of {after} arrived before the abort", expects.position());
        expects.check(&chunk[..read])?;
    }
    let mut rng = SmallRng::seed_from_u64(side.seed);
    let half = side.send_bytes / 2;
    let sending = send_up_to(&mut stream, side, &mut sends, half, &mut rng, lanes.sends);
    sending.await.context("sending before the abort")?;
    stream.set_zero_linger().context("asking for a reset")
}

fn is_reset(error: &anyhow::Error) -> bool {
    let kind = error.downcast_ref::<io::Error>().map(io::Error::kind);
    matches!(kind, Some(io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe))
}
