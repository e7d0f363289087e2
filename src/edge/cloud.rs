//! Cloud balancers, as Terraform.

use super::{EdgeError, Facts};
use crate::model::{Protocol, UdpHeader};

pub(super) fn aws_nlb(facts: &Facts<'_>) -> Result<String, EdgeError> {
    facts.only_tcp("an AWS NLB as it is known here")?;
    let (id, relay, port) = (facts.identifier(), facts.edge.relay, facts.edge.public_port);
    // names of target groups are letters, digits and hyphens, 32 at most
    let group: String = facts
        .name
        .replace(['.', '_'], "-")
        .chars()
        .take(32)
        .collect();
    let group = group.trim_matches('-');
    let (family, ip, relay_port) = match relay.is_ipv6() {
        true => ("ipv6", relay.ip(), relay.port()),
        false => ("ipv4", relay.ip(), relay.port()),
    };
    let preface = facts.preface(
        "#",
        "An AWS Network Load Balancer",
        &[
            "WARNING: an NLB sends the header with the first bytes of the client. Where the server speaks first",
            "(ssh, SMTP, FTP, MySQL), both wait and the relay gives up after header-timeout: such a protocol needs",
            "another proxy.",
            "WARNING: preserve_client_ip has to be off, or the relay's peer is the client, whom no allow list has.",
            "The NLB's own addresses, or its subnets, belong in the allow list.",
            "Health checks come without a header, and the relay logs them; point them at a port that answers.",
        ],
    );
    Ok(format!(
        "{preface}
resource \"aws_lb_target_group\" \"{id}\" {{
  name               = \"{group}\"
  vpc_id             = var.vpc_id
  target_type        = \"ip\"
  ip_address_type    = \"{family}\"
  protocol           = \"TCP\"
  port               = {relay_port}
  proxy_protocol_v2  = true
  preserve_client_ip = false
}}

resource \"aws_lb_target_group_attachment\" \"{id}\" {{
  target_group_arn = aws_lb_target_group.{id}.arn
  target_id        = \"{ip}\"
  port             = {relay_port}
}}

resource \"aws_lb_listener\" \"{id}\" {{
  load_balancer_arn = var.load_balancer_arn
  protocol          = \"TCP\"
  port              = {port}
  default_action {{
    type             = \"forward\"
    target_group_arn = aws_lb_target_group.{id}.arn
  }}
}}
"
    ))
}

pub(super) fn spectrum(facts: &Facts<'_>) -> Result<String, EdgeError> {
    let (id, relay, port) = (facts.identifier(), facts.edge.relay, facts.edge.public_port);
    let protocol = facts.protocol;
    let header = match (protocol, facts.header) {
        // the binary form carries both families alike and costs less to read
        (Protocol::Tcp, _) | (Protocol::Udp, UdpHeader::First) => "v2",
        (Protocol::Udp, UdpHeader::Spp) => "simple",
        (Protocol::Udp, UdpHeader::Every) => {
            return Err(EdgeError(format!(
                "Spectrum does not send a header with every datagram: {} needs udp-header=spp or udp-header=first",
                facts.name
            )));
        }
    };
    let preface = facts.preface(
        "#",
        "Cloudflare Spectrum",
        &[
            "The relay's address has to be reachable from Cloudflare, and Cloudflare's ranges",
            "(https://www.cloudflare.com/ips/) belong in the allow list. PROXY protocol is part of the Enterprise plan.",
            "Version 4 of the provider writes dns as a block: dns { ... }.",
        ],
    );
    Ok(format!(
        "{preface}
resource \"cloudflare_spectrum_application\" \"{id}\" {{
  zone_id        = var.zone_id
  protocol       = \"{protocol}/{port}\"
  traffic_type   = \"direct\"
  dns            = {{ type = \"CNAME\", name = var.hostname }}
  origin_direct  = [\"{protocol}://{relay}\"]
  proxy_protocol = \"{header}\"
}}
"
    ))
}
