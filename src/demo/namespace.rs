//! Namespaces of this process: leaving the host's, making hosts, cabling them.
//!
//! Owns: `unshare(2)`, `setns(2)`, the private /run, veth pairs and their addresses. Must not know: what
//! runs on the hosts.

use std::fs::{self, File};
use std::io;
use std::net::{IpAddr, TcpListener};
use std::os::fd::{AsFd, AsRawFd};

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};
use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags};
use rtnetlink::packet_route::link::{InfoData, InfoVeth};
use rtnetlink::{
    Handle, LinkMessageBuilder, LinkUnspec, LinkVeth, RouteMessageBuilder, new_connection,
};

/// Why the hosts could not be built.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Neither root nor user namespaces for others.
    #[error(
        "cannot make namespaces of its own: run it as root (sudo), or allow user namespaces \
         (sysctl kernel.unprivileged_userns_clone, user.max_user_namespaces, \
         kernel.apparmor_restrict_unprivileged_userns)"
    )]
    NotPermitted(#[source] io::Error),
    /// A step failed on the way into namespaces of our own.
    #[error("cannot {operation}")]
    System {
        /// What was tried.
        operation: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// An interface, address or route could not be made.
    #[error("cannot {operation} on host {host}")]
    Network {
        /// What was tried.
        operation: &'static str,
        /// Where.
        host: &'static str,
        /// What the kernel said.
        #[source]
        source: rtnetlink::Error,
    },
}

fn system<E: Into<io::Error>>(operation: &'static str) -> impl FnOnce(E) -> Error {
    move |source| Error::System {
        operation,
        source: source.into(),
    }
}

/// How the process left the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Isolation {
    /// As root: new mount and network namespaces.
    Root,
    /// In a user namespace, where the caller is root and nobody else is anything.
    User,
}

/// Leaves the host's mount namespace (and user namespace, where that is needed for it) for good, and puts
/// an empty /run over its own: locks of the host, such as /run/xtables.lock, cannot be met from there.
///
/// # Errors
/// [`Error::NotPermitted`] where the kernel allows neither. Fails with EINVAL once the process has
/// threads: `CLONE_NEWUSER` takes single-threaded processes only.
pub fn isolate() -> Result<Isolation, Error> {
    let (uid, gid) = (nix::unistd::geteuid(), nix::unistd::getegid());
    let isolation = match unshare(CloneFlags::CLONE_NEWNS) {
        Ok(()) => Isolation::Root,
        Err(Errno::EPERM) => {
            unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNS)
                .map_err(|errno| Error::NotPermitted(errno.into()))?;
            // a group map is only taken from a process that has given up setgroups(2)
            for (path, text) in [
                ("/proc/self/setgroups", "deny".to_owned()),
                ("/proc/self/uid_map", format!("0 {uid} 1")),
                ("/proc/self/gid_map", format!("0 {gid} 1")),
            ] {
                fs::write(path, text).map_err(Error::NotPermitted)?;
            }
            Isolation::User
        }
        Err(errno) => return Err(system("leave the mount namespace")(errno)),
    };
    let nothing = None::<&str>;
    mount(
        nothing,
        "/",
        nothing,
        MsFlags::MS_REC | MsFlags::MS_PRIVATE,
        nothing,
    )
    .and_then(|()| {
        let options = Some("mode=755");
        mount(
            Some("demo"),
            "/run",
            Some("tmpfs"),
            MsFlags::empty(),
            options,
        )
    })
    // a user namespace without capabilities is what AppArmor leaves of one
    .map_err(|errno| match isolation {
        Isolation::User => Error::NotPermitted(errno.into()),
        Isolation::Root => system("mount an empty /run")(errno),
    })?;
    Ok(isolation)
}

/// A host: a network namespace, gone with the value and the threads in it.
#[derive(Debug)]
pub struct Namespace {
    name: &'static str,
    file: File,
    ipv6: bool,
}

impl Namespace {
    /// A host with `lo` up.
    ///
    /// # Errors
    /// When the kernel gives no namespace.
    pub fn new(name: &'static str) -> Result<Self, Error> {
        let file = std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).map_err(|errno| Error::NotPermitted(errno.into()))?;
            File::open("/proc/thread-self/ns/net").map_err(system("open a network namespace"))
        })
        .join()
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        let mut host = Self {
            name,
            file,
            ipv6: false,
        };
        host.enter(|| host.netlink(async |netlink| netlink.up("lo", "switch on lo").await))??;
        host.ipv6 = host.enter(|| TcpListener::bind("[::1]:0").is_ok())?;
        Ok(host)
    }

    /// A path by which other programs of this user find the host, while this value lives.
    pub fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.file.as_raw_fd())
    }

    /// Whether the kernel serves IPv6 here.
    pub fn has_ipv6(&self) -> bool {
        self.ipv6
    }

    /// Runs work on a thread of this host; sockets, threads and processes made there stay there.
    ///
    /// # Errors
    /// When the namespace cannot be entered.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T, Error> {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                setns(self.file.as_fd(), CloneFlags::CLONE_NEWNET)
                    .map_err(system("enter a network namespace"))?;
                Ok(work())
            });
            thread
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Lays a cable to another host. Each end is a network interface named after the other host, with
    /// the addresses of its host (as /32 and /128) and a route to the other's, pairwise.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn cable(&self, addresses: &[IpAddr], peer: &Self, others: &[IpAddr]) -> Result<(), Error> {
        self.enter(|| self.netlink(async |netlink| netlink.veth(peer).await))??;
        for (host, other, own, beyond) in [
            (self, peer, addresses, others),
            (peer, self, others, addresses),
        ] {
            host.enter(|| {
                host.netlink(async |netlink| {
                    netlink.up(other.name, "switch on an interface").await?;
                    let ends = own.iter().copied().zip(beyond.iter().copied());
                    for (own, beyond) in ends.filter(|(own, _)| own.is_ipv4() || host.ipv6) {
                        netlink.address(other.name, own).await?;
                        netlink.route(other.name, Some(beyond), own).await?;
                    }
                    Ok(())
                })
            })??;
        }
        Ok(())
    }

    /// Routes everything else through the cable to another host.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn default_route(&self, towards: &Self, from: IpAddr) -> Result<(), Error> {
        self.enter(|| self.netlink(async |netlink| netlink.route(towards.name, None, from).await))?
    }

    /// Runs requests on a netlink connection of the calling thread's namespace.
    fn netlink<T>(&self, work: impl AsyncFnOnce(Netlink) -> Result<T, Error>) -> Result<T, Error> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .build()
            .map_err(system("start a runtime"))?;
        runtime.block_on(async {
            let (connection, handle, _) =
                new_connection().map_err(system("open a netlink socket"))?;
            tokio::spawn(connection);
            work(Netlink {
                host: self.name,
                handle,
            })
            .await
        })
    }
}

/// Requests for one host.
struct Netlink {
    host: &'static str,
    handle: Handle,
}

impl Netlink {
    fn failed(&self, operation: &'static str) -> impl FnOnce(rtnetlink::Error) -> Error + use<> {
        let host = self.host;
        move |source| Error::Network {
            operation,
            host,
            source,
        }
    }

    async fn up(&self, interface: &str, operation: &'static str) -> Result<(), Error> {
        let message = LinkUnspec::new_with_index(index(interface)?).up().build();
        self.handle
            .link()
            .set(message)
            .execute()
            .await
            .map_err(self.failed(operation))
    }

    async fn veth(&self, peer: &Namespace) -> Result<(), Error> {
        let far_end = LinkMessageBuilder::<LinkUnspec>::new()
            .name(self.host)
            .setns_by_fd(peer.file.as_raw_fd())
            .build();
        let pair = LinkVeth::new(peer.name, self.host)
            .set_info_data(InfoData::Veth(InfoVeth::Peer(far_end)))
            .build();
        self.handle
            .link()
            .add(pair)
            .execute()
            .await
            .map_err(self.failed("make a veth pair"))
    }

    async fn address(&self, interface: &str, address: IpAddr) -> Result<(), Error> {
        let length = if address.is_ipv4() { 32 } else { 128 };
        let mut request = self
            .handle
            .address()
            .add(index(interface)?, address, length);
        if address.is_ipv6() {
            // usable at once: nobody else is on the cable
            let flags = AddressAttribute::Flags(AddressFlags::Nodad);
            request.message_mut().attributes.push(flags);
        }
        request
            .execute()
            .await
            .map_err(self.failed("add an address"))
    }

    /// A route to one address, or to everywhere in the family of `from`.
    async fn route(&self, interface: &str, to: Option<IpAddr>, from: IpAddr) -> Result<(), Error> {
        let interface = index(interface)?;
        let message = match (from, to) {
            (IpAddr::V4(from), to) => {
                let route = RouteMessageBuilder::<std::net::Ipv4Addr>::new()
                    .output_interface(interface)
                    .pref_source(from);
                match to {
                    Some(IpAddr::V4(to)) => route.destination_prefix(to, 32),
                    _ => route,
                }
                .scope(rtnetlink::packet_route::route::RouteScope::Link)
                .build()
            }
            (IpAddr::V6(from), to) => {
                let route = RouteMessageBuilder::<std::net::Ipv6Addr>::new()
                    .output_interface(interface)
                    .pref_source(from);
                match to {
                    Some(IpAddr::V6(to)) => route.destination_prefix(to, 128),
                    _ => route,
                }
                .build()
            }
        };
        self.handle
            .route()
            .add(message)
            .execute()
            .await
            .map_err(self.failed("add a route"))
    }
}

/// The number of an interface in the calling thread's namespace.
fn index(interface: &str) -> Result<u32, Error> {
    nix::net::if_::if_nametoindex(interface).map_err(system("find an interface"))
}
