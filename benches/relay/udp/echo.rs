//! The UDP echo service: a process of its own, threads that share a port (`SO_REUSEPORT`), a plain loop of
//! `recvfrom` and `sendto` in each.

use std::net::{SocketAddrV4, UdpSocket};
use std::process::{Child, Stdio};

use anyhow::{Context, Result};
use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Protocol, Socket, Type};

use crate::echo::WHO;
use crate::namespace::Namespace;

/// The receive buffer of each of its sockets, in bytes.
const BUFFER: usize = 4 << 20;

/// The running service; ends with the value.
pub(super) struct Echo(Child);

impl Echo {
    /// Starts this program again as the service, in a namespace.
    ///
    /// # Errors
    /// When it cannot be started.
    pub(super) fn start(
        namespace: &Namespace,
        address: SocketAddrV4,
        threads: usize,
    ) -> Result<Self> {
        let program = std::env::current_exe().context("cannot find this program")?;
        let child = namespace
            .command(program)
            .arg("--udp-echo")
            .arg(address.to_string())
            .arg("--service-threads")
            .arg(threads.to_string())
            .stdout(Stdio::null())
            .spawn()
            .context("cannot start the echo service")?;
        Ok(Self(child))
    }

    /// Its process id.
    pub(super) fn pid(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        // both fail only when the service is gone already
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Serves until killed.
///
/// # Errors
/// When it cannot bind.
pub(crate) fn serve(address: SocketAddrV4, threads: usize) -> Result<()> {
    let sockets = (0..threads)
        .map(|_| bind(address).with_context(|| format!("cannot bind {address}")))
        .collect::<Result<Vec<_>>>()?;
    std::thread::scope(|scope| {
        for socket in &sockets {
            scope.spawn(|| answer(socket));
        }
    });
    Ok(())
}

fn bind(address: SocketAddrV4) -> std::io::Result<UdpSocket> {
    let socket = Socket::new(Domain::IPV4, Type::DGRAM, Some(Protocol::UDP))?;
    socket.set_reuse_port(true)?;
    // as DNS servers do: what a burst of all clients needs
    setsockopt(&socket, sockopt::RcvBufForce, &BUFFER)?;
    socket.bind(&address.into())?;
    Ok(socket.into())
}

fn answer(socket: &UdpSocket) {
    let mut buffer = [0; 2048];
    loop {
        // what fails is about one datagram: whether answers come is the load's to judge
        let Ok((length, peer)) = socket.recv_from(&mut buffer) else {
            continue;
        };
        let _ = match &buffer[..length] {
            asked if asked == WHO => socket.send_to(peer.to_string().as_bytes(), peer),
            datagram => socket.send_to(datagram, peer),
        };
    }
}
