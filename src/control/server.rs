//! The socket's side of the process that runs relays.

use std::future::Future;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::unix::UCred;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tracing::{debug, warn};

use super::messages::{Request, Response};

/// The longest request, in bytes with its line feed.
pub const MAX_REQUEST: u64 = 64 << 10;
/// How many callers at a time; what comes beyond waits in the socket's queue.
const MAX_CALLERS: usize = 64;
/// How long a caller may be silent between two requests, and how long an answer may take to be read.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long accepting pauses when descriptors run out.
const PAUSE: Duration = Duration::from_millis(200);

/// Binds the socket for this user only; what a process that is gone left at the path is replaced.
/// The caller holds the lock that says that no other process owns it.
///
/// # Errors
/// When the path is too long for a socket (107 bytes), or the directory cannot be written.
pub fn bind(path: &Path) -> io::Result<std::os::unix::net::UnixListener> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = std::os::unix::net::UnixListener::bind(path)?;
    // between the two calls it is the peer's credentials that keep others out
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Answers requests until dropped, each caller in turn, several callers at a time.
///
/// Runs on a local runtime: handlers may share state without a lock. Cancel-safe in that a request
/// that was begun is dropped with the callers' connections.
///
/// # Errors
/// When the socket cannot be watched.
pub async fn serve<H, A>(
    listener: std::os::unix::net::UnixListener,
    handler: H,
) -> io::Result<std::convert::Infallible>
where
    H: Fn(Request) -> A + 'static,
    A: Future<Output = Response> + 'static,
{
    let listener = UnixListener::from_std(listener)?;
    let handler = Rc::new(handler);
    let places = std::sync::Arc::new(Semaphore::new(MAX_CALLERS));
    let mut callers = JoinSet::new();
    loop {
        while callers.try_join_next().is_some() {}
        let Ok(place) = std::sync::Arc::clone(&places).acquire_owned().await else {
            return Err(io::Error::other("the semaphore is closed"));
        };
        match listener.accept().await {
            Ok((stream, _)) => {
                let handler = Rc::clone(&handler);
                callers.spawn_local(async move {
                    if let Err(error) = attend(stream, &*handler).await {
                        debug!(%error, "control: a caller was closed");
                    }
                    drop(place);
                });
            }
            Err(error) => {
                warn!(%error, "control: cannot accept");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

/// Root and the user of this process may ask.
fn allowed(peer: &UCred) -> bool {
    peer.uid() == 0 || peer.uid() == nix::unistd::geteuid().as_raw()
}

async fn attend<H, A>(mut stream: UnixStream, handler: &H) -> io::Result<()>
where
    H: Fn(Request) -> A,
    A: Future<Output = Response>,
{
    let peer = stream.peer_cred()?;
    if !allowed(&peer) {
        return Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            format!("uid {} may not ask", peer.uid()),
        ));
    }
    let (read, mut write) = stream.split();
    let mut read = BufReader::new(read);
    let mut line = Vec::new();
    loop {
        line.clear();
        let mut limited = (&mut read).take(MAX_REQUEST);
        timeout(PATIENCE, limited.read_until(b'\n', &mut line)).await??;
        if line.is_empty() {
            return Ok(());
        }
        if line.last() != Some(&b'\n') {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the line is too long or has no end",
            ));
        }
        let request = serde_json::from_slice(&line)?;
        let mut answer = serde_json::to_vec(&handler(request).await)?;
        answer.push(b'\n');
        timeout(PATIENCE, write.write_all(&answer)).await??;
    }
}

#[cfg(test)]
mod tests {
    use super::super::client::Client;
    use super::*;
    use std::io::{Read, Write};

    fn serving<T: Send + 'static>(ask: impl FnOnce(&Path) -> T + Send + 'static) -> T {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a@1.sock");
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build_local(Default::default())
            .unwrap();
        runtime.block_on(async {
            let listener = bind(&path).unwrap();
            let asking = tokio::task::spawn_blocking(move || ask(&path));
            tokio::select! {
                ended = serve(listener, async |request| Response::ok(&request)) => panic!("{ended:?}"),
                answer = asking => answer.unwrap(),
            }
        })
    }

    #[test]
    fn requests_are_answered_in_turn() {
        serving(|path| {
            let mut client = Client::connect(path).unwrap();
            for _ in 0..3 {
                let answer = client.ask(&Request::Reload {}).unwrap();
                assert_eq!(answer["command"], "reload");
            }
            let mode = std::fs::metadata(path).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600);
        });
    }

    #[test]
    fn what_is_no_request_is_closed_without_an_answer() {
        let long = [vec![b' '; MAX_REQUEST as usize], b"\n".to_vec()].concat();
        let bad: [&[u8]; 6] = [
            b"\n",
            b"{\"command\":\"format\"}\n",
            b"GET / HTTP/1.1\r\n\r\n",
            b"\xff\xfe\0\n",
            b"{\"command\":\"reload\"}",
            &long,
        ];
        for bytes in bad {
            let bytes = bytes.to_vec();
            let shown = String::from_utf8_lossy(&bytes[..bytes.len().min(30)]).into_owned();
            let answer = serving(move |path| {
                let mut stream = std::os::unix::net::UnixStream::connect(path).unwrap();
                // the other side may have closed in the midst of it
                let _ = stream.write_all(&bytes);
                let _ = stream.shutdown(std::net::Shutdown::Write);
                let mut answer = Vec::new();
                let _ = stream.read_to_end(&mut answer);
                answer
            });
            assert!(answer.is_empty(), "{shown}");
        }
    }
}
