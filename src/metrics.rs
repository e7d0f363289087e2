//! Metrics over HTTP, for Prometheus: `GET /metrics` on a TCP address or a Unix socket.
//!
//! Owns: the listener, the limits on who scrapes. Must not know: where the numbers come from; each scrape
//! asks for a [`Process`] and writes it down ([`exposition`]).

mod classic;
mod exposition;

use std::convert::Infallible;
use std::fmt;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::rc::Rc;
use std::str::FromStr;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{ACCEPT, ALLOW, CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::Semaphore;
use tracing::{debug, warn};

use crate::model::ValueError;
use crate::overview::Process;

/// How many scrapers at a time; what comes beyond waits in the socket's queue.
const MAX_SCRAPERS: usize = 16;
/// How long a scraper may take to send its request, also between two of them.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long a scraper may stay in all: it comes back for more.
const LONGEST: Duration = Duration::from_secs(300);
/// How long accepting pauses when descriptors run out.
const PAUSE: Duration = Duration::from_millis(200);

/// Where metrics are served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Endpoint {
    /// A TCP address.
    Tcp(SocketAddr),
    /// The path of a Unix socket.
    Unix(PathBuf),
}

impl FromStr for Endpoint {
    type Err = ValueError;

    /// `127.0.0.1:9180`, `[::1]:9180`, or the absolute path of a Unix socket.
    fn from_str(text: &str) -> Result<Self, ValueError> {
        if text.starts_with('/') {
            return Ok(Self::Unix(PathBuf::from(text)));
        }
        text.parse().map(Self::Tcp).map_err(|_| {
            ValueError::new(
                format!("'{text}' is no address for metrics"),
                "an address and a port such as 127.0.0.1:9180, or the absolute path of a Unix socket",
            )
        })
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(addr) => addr.fmt(f),
            Self::Unix(path) => path.display().fmt(f),
        }
    }
}

/// A bound endpoint.
#[derive(Debug)]
pub enum Listener {
    /// On TCP.
    Tcp(TcpListener),
    /// On a Unix socket.
    Unix(UnixListener),
}

impl Listener {
    /// Binds within a runtime. A socket that a process left behind at the path is replaced; one that
    /// somebody answers is not.
    ///
    /// # Errors
    /// What the kernel said.
    pub async fn bind(endpoint: &Endpoint) -> io::Result<Self> {
        match endpoint {
            Endpoint::Tcp(addr) => Ok(Self::Tcp(TcpListener::bind(addr).await?)),
            Endpoint::Unix(path) => {
                let refused = match tokio::net::UnixStream::connect(path).await {
                    Ok(_) => return Err(io::ErrorKind::AddrInUse.into()),
                    Err(error) => error.kind() == io::ErrorKind::ConnectionRefused,
                };
                if refused {
                    std::fs::remove_file(path)?;
                }
                Ok(Self::Unix(UnixListener::bind(path)?))
            }
        }
    }

    /// The TCP address, which tells the port where 0 was asked for.
    pub fn local_addr(&self) -> Option<SocketAddr> {
        match self {
            Self::Tcp(listener) => listener.local_addr().ok(),
            Self::Unix(_) => None,
        }
    }
}

/// Serves scrapes until dropped. `gather` is asked anew for each. Runs on a local runtime.
pub async fn serve<G, A>(listener: Listener, gather: G) -> Infallible
where
    G: Fn() -> A + 'static,
    A: Future<Output = Process> + 'static,
{
    let gather = Rc::new(gather);
    let places = Rc::new(Semaphore::new(MAX_SCRAPERS));
    loop {
        let accepted = match &listener {
            Listener::Tcp(tcp) => tcp.accept().await.map(|(stream, _)| Stream::Tcp(stream)),
            Listener::Unix(unix) => unix.accept().await.map(|(stream, _)| Stream::Unix(stream)),
        };
        let stream = match accepted {
            Ok(stream) => stream,
            Err(error) => {
                warn!(%error, "metrics: cannot accept");
                tokio::time::sleep(PAUSE).await;
                continue;
            }
        };
        let (gather, places) = (Rc::clone(&gather), Rc::clone(&places));
        tokio::task::spawn_local(async move {
            let Ok(_place) = places.acquire().await else {
                return;
            };
            match stream {
                Stream::Tcp(stream) => attend(stream, gather).await,
                Stream::Unix(stream) => attend(stream, gather).await,
            }
        });
    }
}

enum Stream {
    Tcp(tokio::net::TcpStream),
    Unix(tokio::net::UnixStream),
}

async fn attend<S, G, A>(stream: S, gather: Rc<G>)
where
    S: AsyncRead + AsyncWrite + Unpin + 'static,
    G: Fn() -> A + 'static,
    A: Future<Output = Process> + 'static,
{
    let service = service_fn(move |request: Request<Incoming>| {
        let gather = Rc::clone(&gather);
        async move { Ok::<_, Infallible>(answer(&request, &*gather).await) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(PATIENCE)
        .max_buf_size(16 << 10)
        .serve_connection(TokioIo::new(stream), service);
    match tokio::time::timeout(LONGEST, connection).await {
        Ok(Ok(())) | Err(_) => {}
        Ok(Err(error)) => debug!(%error, "metrics: a scraper was closed"),
    }
}

async fn answer<G, A>(request: &Request<Incoming>, gather: &G) -> Response<Full<Bytes>>
where
    G: Fn() -> A,
    A: Future<Output = Process>,
{
    if request.uri().path() != "/metrics" {
        return plain(StatusCode::NOT_FOUND, "metrics are at /metrics\n");
    }
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        let mut refused = plain(StatusCode::METHOD_NOT_ALLOWED, "GET or HEAD\n");
        let allowed = HeaderValue::from_static("GET, HEAD");
        refused.headers_mut().insert(ALLOW, allowed);
        return refused;
    }
    let wants_open_metrics = request
        .headers()
        .get_all(ACCEPT)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .any(|value| value.contains("application/openmetrics-text"));
    let Ok(text) = exposition::write(gather().await) else {
        return plain(
            StatusCode::INTERNAL_SERVER_ERROR,
            "the metrics could not be written\n",
        );
    };
    let (kind, text) = if wants_open_metrics {
        (
            "application/openmetrics-text; version=1.0.0; charset=utf-8",
            text,
        )
    } else {
        (
            "text/plain; version=0.0.4; charset=utf-8",
            classic::of(&text),
        )
    };
    let mut response = Response::new(Full::from(text));
    let kind = HeaderValue::from_static(kind);
    response.headers_mut().insert(CONTENT_TYPE, kind);
    response
}

fn plain(status: StatusCode, text: &'static str) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from(text));
    *response.status_mut() = status;
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints() {
        let parse = str::parse::<Endpoint>;
        assert_eq!(
            parse("[::1]:9180").unwrap(),
            Endpoint::Tcp("[::1]:9180".parse().unwrap())
        );
        assert_eq!(
            parse("/run/mmproxy/metrics.sock").unwrap(),
            Endpoint::Unix("/run/mmproxy/metrics.sock".into())
        );
        for bad in ["9180", ":9180", "localhost:9180", "run/metrics", ""] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
