//! Faulty proxies. The streams must find the faults.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use anyhow::Result;
use tokio::io::{AsyncReadExt, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

/// The fault of [`bad_proxy`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Damage {
    LosesAByte,
    DoublesAByte,
    ClosesOnHalfClose,
    TurnsResetsIntoFins,
    /// Holds the client's bytes for [`STALL`], in the middle of the stream.
    Stalls,
}

pub(crate) const STALL: Duration = Duration::from_millis(1500);

/// Starts a proxy for `target` with a fault.
pub(crate) async fn bad_proxy(target: SocketAddr, damage: Damage) -> Result<SocketAddr> {
    let listener = tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    let address = listener.local_addr()?;
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            tokio::spawn(async move {
                // Any error ends the connection. The tests check that the peers notice.
                carry_badly(client, target, damage).await.ok();
            });
        }
    });
    Ok(address)
}

async fn carry_badly(mut client: TcpStream, target: SocketAddr, damage: Damage) -> Result<()> {
    let mut backend = TcpStream::connect(target).await?;
    let (mut from_client, mut to_client) = client.split();
    let (mut from_backend, mut to_backend) = backend.split();
    let up = async {
        // Comes after the request, so that the stream is damaged and not the request.
        let mut start = vec![0; 5_000];
        let read = read_some(&mut from_client, &mut start).await?;
        to_backend.write_all(&start[..read]).await?;
        match damage {
            Damage::LosesAByte => _ = from_client.read(&mut [0]).await?,
            Damage::DoublesAByte => to_backend.write_all(&start[read - 1..read]).await?,
            // Longer, since the reader may begin to wait later.
            Damage::Stalls => sleep(2 * STALL).await,
            Damage::ClosesOnHalfClose | Damage::TurnsResetsIntoFins => {}
        }
        tokio::io::copy(&mut from_client, &mut to_backend).await?;
        anyhow::ensure!(damage != Damage::ClosesOnHalfClose);
        Ok(to_backend.shutdown().await?)
    };
    let down = async {
        tokio::io::copy(&mut from_backend, &mut to_client).await?;
        anyhow::ensure!(damage != Damage::ClosesOnHalfClose);
        Ok(to_client.shutdown().await?)
    };
    tokio::try_join!(up, down).map(|_| ())
}

/// Fills `buffer` as far as bytes come.
async fn read_some(from: &mut (impl AsyncReadExt + Unpin), buffer: &mut [u8]) -> Result<usize> {
    let mut filled = 0;
    while let Ok(Ok(read)) = timeout(Duration::from_millis(300), from.read(&mut buffer[filled..])).await {
        filled += read;
        if read == 0 || filled == buffer.len() {
            break;
        }
    }
    Ok(filled)
}
