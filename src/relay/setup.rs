//! From an accepted connection to a relayed pair: allowed proxy, header, client, spoofed connection,
//! surplus bytes.
//!
//! The usual case, header and first payload there already and a local service, runs through in one go
//! without a wait, a timer or an allocation; whatever has to wait goes on as a boxed future.

use std::cell::RefCell;
use std::future::Future;
use std::io::{self, Write};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout, timeout_at};
use tracing::{debug, trace};

use super::client;
use super::copy::{First, Pair};
use super::counters::Refusal;
use super::header::{self, Decoded, Endpoints, HeaderError};
use super::report::{self, ConnectError, Subject};
use super::worker::Worker;
use crate::model::{ClientAddr, ProxyAddr, TargetAddr};
use crate::socket::{self, Spoof, Spoofed};

/// Whose connection a pair is.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ends {
    pub(super) proxy: ProxyAddr,
    pub(super) client: ClientAddr,
}

/// A connection that reached the service.
pub(super) struct Ready {
    pub(super) pair: Pair,
    pub(super) ends: Ends,
}

/// The rest of a set-up that has to wait; `None` when the connection is over.
pub(super) type Slow = Pin<Box<dyn Future<Output = Option<Ready>>>>;

/// What became of an accepted connection at first go.
pub(super) enum Begun {
    Ready(Ready),
    Slow(Slow),
    Over,
}

/// The target's side of a connection, begun.
struct Opened {
    target: TcpStream,
    first: First,
    connected: bool,
    ends: Ends,
    to: TargetAddr,
}

/// What the bytes received so far lead to.
enum Verdict {
    Incomplete,
    Opened(Opened),
    Refused,
}

/// Does everything that needs no wait.
pub(super) fn begin(
    worker: &Rc<Worker>,
    cx: &mut Context<'_>,
    mut client: TcpStream,
    proxy: ProxyAddr,
) -> Begun {
    if !worker.settings().allow.allows(proxy.ip()) {
        refuse(
            worker,
            Refusal::ProxyNotAllowed,
            proxy,
            None,
            "refused: the proxy is not on the allow list",
        );
        socket::reset_on_close(&client);
        return Begun::Over;
    }
    let mut buffer = worker.shared.buffer.borrow_mut();
    let mut read = ReadBuf::new(&mut buffer);
    // tokio takes a fresh socket for readable: the first read needs no readiness event
    let received = match Pin::new(&mut client).poll_read(cx, &mut read) {
        Poll::Ready(Ok(())) if !read.filled().is_empty() => read.filled(),
        Poll::Ready(_) => {
            ended_without_header(worker, proxy, &[]);
            return Begun::Over;
        }
        Poll::Pending => &[],
    };
    match judge(worker, proxy, received) {
        Verdict::Opened(opened) if opened.connected => Begun::Ready(paired(
            worker,
            client,
            opened.target,
            opened.first,
            opened.ends,
        )),
        Verdict::Opened(opened) => {
            let worker = Rc::clone(worker);
            Begun::Slow(Box::pin(async move {
                finish_connect(&worker, client, opened).await
            }))
        }
        Verdict::Incomplete if !worker.may_wait() => {
            refuse(
                worker,
                Refusal::TooManyWaiting,
                proxy,
                None,
                "refused: too many connections wait for their PROXY header",
            );
            socket::reset_on_close(&client);
            Begun::Over
        }
        Verdict::Incomplete => {
            let received = received.to_vec();
            let waiting = Waiting::new(worker);
            Begun::Slow(Box::pin(finish_header(waiting, client, proxy, received)))
        }
        Verdict::Refused => {
            socket::reset_on_close(&client);
            Begun::Over
        }
    }
}

/// A place among the connections that wait for their header.
struct Waiting(Rc<Worker>);

impl Waiting {
    fn new(worker: &Rc<Worker>) -> Self {
        worker.counters.waiting.add(1);
        Self(Rc::clone(worker))
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.counters.waiting.sub_one();
    }
}

/// Reads on until the header is there, is none, or takes too long.
async fn finish_header(
    waiting: Waiting,
    client: TcpStream,
    proxy: ProxyAddr,
    received: Vec<u8>,
) -> Option<Ready> {
    let worker = Rc::clone(&waiting.0);
    let received = RefCell::new(received);
    let limit = worker.settings().header_timeout;
    let outcome = timeout_at(
        Instant::now() + limit,
        read_header(&worker, &client, proxy, &received),
    )
    .await;
    drop(waiting);
    match outcome {
        Ok(Some(opened)) => finish_connect(&worker, client, opened).await,
        Ok(None) => {
            socket::reset_on_close(&client);
            None
        }
        Err(_elapsed) => {
            let message = report::header_timeout(&received.borrow(), limit);
            refuse(&worker, Refusal::HeaderTimeout, proxy, None, &message);
            socket::reset_on_close(&client);
            None
        }
    }
}

async fn read_header(
    worker: &Worker,
    client: &TcpStream,
    proxy: ProxyAddr,
    received: &RefCell<Vec<u8>>,
) -> Option<Opened> {
    loop {
        if client.readable().await.is_err() {
            return None;
        }
        let mut received = received.borrow_mut();
        let mut buffer = worker.shared.buffer.borrow_mut();
        // what came before goes in front, so that the decoder sees one piece; a header that is not
        // complete is far shorter than the buffer
        buffer[..received.len()].copy_from_slice(&received);
        let length = match client.try_read(&mut buffer[received.len()..]) {
            Ok(0) => {
                ended_without_header(worker, proxy, &received);
                return None;
            }
            Ok(more) => received.len() + more,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            Err(_) => {
                ended_without_header(worker, proxy, &received);
                return None;
            }
        };
        match judge(worker, proxy, &buffer[..length]) {
            Verdict::Incomplete => {
                let known = received.len();
                received.extend_from_slice(&buffer[known..length]);
            }
            Verdict::Opened(opened) => return Some(opened),
            Verdict::Refused => return None,
        }
    }
}

/// Decodes what came and acts on it. Never waits.
fn judge(worker: &Worker, proxy: ProxyAddr, received: &[u8]) -> Verdict {
    if received.is_empty() {
        return Verdict::Incomplete;
    }
    let (client, surplus) = match header::decode(received) {
        Ok(Decoded::Incomplete) => return Verdict::Incomplete,
        Ok(Decoded::Complete { header, length }) => {
            let client = match header.endpoints {
                Endpoints::Proxied { client, .. } => client,
                Endpoints::Local => ClientAddr::new(proxy.get()),
            };
            (client, &received[length..])
        }
        Err(error) => {
            let kind = match error {
                HeaderError::NotProxy => Refusal::NoHeader,
                _ => Refusal::BadHeader,
            };
            let message = report::bad_header(error, received);
            refuse(worker, kind, proxy, None, &message);
            return Verdict::Refused;
        }
    };
    open(worker, Ends { proxy, client }, surplus).map_or(Verdict::Refused, Verdict::Opened)
}

/// Begins the spoofed connection and hands over the surplus if the service takes it at once.
fn open(worker: &Worker, ends: Ends, surplus: &[u8]) -> Option<Opened> {
    let settings = worker.settings();
    let family = ends.client.family();
    let refused = |kind| {
        let message = report::refused_client(kind, family);
        refuse(worker, kind, ends.proxy, Some(ends.client), &message);
        None
    };
    if let Some(kind) = client::refusal(ends.client.ip()) {
        return refused(kind);
    }
    let Some(to) = settings.target(family) else {
        return refused(Refusal::FamilyNotServed);
    };
    let spoofed = socket::spoofed_tcp(&Spoof {
        client: ends.client,
        target: to,
        mark: settings.mark,
        port: settings.port,
    });
    let Spoofed {
        socket: target,
        port_given_up,
    } = match spoofed {
        Ok(spoofed) => spoofed,
        Err(error) => match ConnectError::spoof(error) {
            Ok(error) => {
                connect_failed(worker, ends, to, &error);
                return None;
            }
            Err(kind) => return refused(kind),
        },
    };
    if port_given_up {
        worker.counters.ports_given_up.add(1);
        debug!(
            proxy.addr = %ends.proxy, client.addr = %ends.client,
            "the client's port is taken: another one is used, the address kept"
        );
    }
    // a connection to a local service is complete when connect() returns, although it says EINPROGRESS
    let (first, connected) = if surplus.is_empty() {
        (First::default(), target.peer_addr().is_ok())
    } else {
        match (&target).write(surplus) {
            Ok(sent) => {
                worker.counters.bytes_to_target.add(sent as u64);
                (First::new(sent, &surplus[sent..]), true)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                (First::new(0, surplus), false)
            }
            Err(error) => {
                let error = ConnectError::kernel("connect", error);
                connect_failed(worker, ends, to, &error);
                return None;
            }
        }
    };
    let target = match TcpStream::from_std(target) {
        Ok(target) => target,
        Err(error) => {
            let error = ConnectError::kernel("watch the socket", error);
            connect_failed(worker, ends, to, &error);
            return None;
        }
    };
    Some(Opened {
        target,
        first,
        connected,
        ends,
        to,
    })
}

/// Waits until the service answers.
async fn finish_connect(worker: &Worker, client: TcpStream, opened: Opened) -> Option<Ready> {
    let Opened {
        target,
        first,
        ends,
        to,
        ..
    } = opened;
    let limit = worker.settings().connect_timeout;
    if let Err(error) = connected_within(&target, limit).await {
        connect_failed(worker, ends, to, &error);
        socket::reset_on_close(&client);
        return None;
    }
    Some(paired(worker, client, target, first, ends))
}

async fn connected_within(target: &TcpStream, limit: Duration) -> Result<(), ConnectError> {
    match timeout(limit, target.writable()).await {
        Err(_elapsed) => {
            // nobody is there to close it with
            socket::reset_on_close(target);
            Err(ConnectError::timed_out(limit))
        }
        Ok(Err(error)) => Err(ConnectError::kernel("wait for the connection", error)),
        Ok(Ok(())) => match target.take_error() {
            Ok(None) => Ok(()),
            Ok(Some(error)) | Err(error) => Err(ConnectError::kernel("connect", error)),
        },
    }
}

fn paired(
    worker: &Worker,
    client: TcpStream,
    target: TcpStream,
    first: First,
    ends: Ends,
) -> Ready {
    worker.counters.relayed.add(1);
    trace!(proxy.addr = %ends.proxy, client.addr = %ends.client, "connected to the service");
    let idle_timeout = worker.settings().idle_timeout;
    Ready {
        pair: Pair::new(client, target, first, idle_timeout),
        ends,
    }
}

fn ended_without_header(worker: &Worker, proxy: ProxyAddr, received: &[u8]) {
    if received.is_empty() {
        worker.counters.empty.add(1);
        debug!(proxy.addr = %proxy, "closed by the proxy without a byte: a health check");
        return;
    }
    refuse(
        worker,
        Refusal::HeaderTruncated,
        proxy,
        None,
        "refused: the connection ended inside the PROXY header",
    );
}

fn refuse(
    worker: &Worker,
    kind: Refusal,
    proxy: ProxyAddr,
    client: Option<ClientAddr>,
    message: &str,
) {
    worker.counters.refuse(kind);
    let client = client
        .as_ref()
        .map(|client| client as &dyn std::fmt::Display);
    worker
        .common
        .limiter
        .warn(Subject::Refused(kind), proxy, client, &message);
}

fn connect_failed(worker: &Worker, ends: Ends, to: TargetAddr, error: &ConnectError) {
    worker.counters.connect_failed(error.kind);
    worker.common.limiter.warn(
        Subject::ConnectFailed(error.kind),
        ends.proxy,
        Some(&ends.client),
        &error.message(to, &worker.settings()),
    );
}
