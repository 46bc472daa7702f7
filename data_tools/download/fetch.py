"""One image from one address, safely: no private address, no endless body, retries with back-off, opt-out honoured.

Server-side request forgery: a list may name http://169.254.169.254/ or a host that resolves to 10.0.0.1, or redirect
there. Literal addresses are checked in the url, names in the resolver, whose answer is the very address connected to,
so a second look-up (DNS rebinding) never happens; redirects are followed here, each checked like a first url.
"""

import asyncio
import email.utils
import ipaddress
import random
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from data_tools.images.decode import sniff

MAX_REDIRECTS = 5
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_RETRY_STATUS = (408, 425, 429, 500, 502, 503, 504)


@dataclass(frozen=True)
class FetchOptions:
    """How images are fetched."""

    concurrency: int = 128
    """Requests at a time, all hosts together."""
    per_host: int = 8
    """Requests at a time to one host."""
    timeout_s: float = 20.0
    """Seconds for one try, from connecting to the last byte."""
    retries: int = 2
    """Further tries after time-outs, broken connections, HTTP 429 and 5xx."""
    backoff_s: float = 1.0
    """Seconds before the first retry, doubled each time, plus up to half at random."""
    max_bytes: int = 32 * 2**20
    """Larger files are given up, in bytes."""
    user_agent: str = "Mozilla/5.0 (compatible; product-painter)"
    """What the servers are told; name yourself and a contact page."""
    robot_name: str = "product-painter"
    """Name under which X-Robots-Tag may address this program alone."""
    opt_out: tuple[str, ...] = ("noai", "noimageai", "noindex", "noimageindex")
    """Directives of X-Robots-Tag that are obeyed, and with them `tdm-reservation: 1`; none: all are ignored."""
    allow_private: bool = False
    """Permit private and loopback addresses: for your own server only, never for a list from elsewhere."""

    def __post_init__(self) -> None:
        if min(self.concurrency, self.per_host, self.max_bytes) < 1 or self.retries < 0:
            raise ValueError("concurrency, per_host and max_bytes must be at least 1, retries at least 0")
        if self.timeout_s <= 0 or self.backoff_s < 0:
            raise ValueError("timeout_s must be above 0 and backoff_s at least 0")


@dataclass(frozen=True)
class Outcome:
    """What became of a url: the file, or a reason."""

    data: bytes = b""
    reason: str = ""
    """"" for an image, else image_unavailable, image_too_large, not_an_image, opted_out, private_address."""
    detail: str = ""
    """Short and the same each time: `HTTP 404`, `timeout`, `no such host` ..."""
    wait_s: float | None = None
    """Not None: worth another try after so many seconds (0: the usual back-off)."""


class PrivateAddress(OSError):
    """A name that leads to private addresses alone."""


def is_public(address: str) -> bool:
    """True for addresses of the public internet; IPv4 inside IPv6 (mapped, 6to4, NAT64, Teredo) is unwrapped."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if ip.version == 6:
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if ip in _NAT64:
            inner = ipaddress.ip_address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_unspecified)


class PublicResolver(AbstractResolver):
    """Names to addresses without the private ones; raises PrivateAddress if no other is left."""

    def __init__(self, inner: AbstractResolver | None = None):
        self._inner = inner or aiohttp.ThreadedResolver()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        found = await self._inner.resolve(host, port, family)
        public = [entry for entry in found if is_public(entry["host"])]
        if found and not public:
            raise PrivateAddress(f"{host} resolves to private addresses")
        return public

    async def close(self) -> None:
        await self._inner.close()


def check_url(url: str, allow_private: bool) -> URL | Outcome:
    """The parsed url, or why it is not requested."""
    try:
        parsed = URL(url.strip())
        host = parsed.host
    except (ValueError, TypeError):
        return Outcome(reason="image_unavailable", detail="not a url")
    if parsed.scheme not in ("http", "https") or not host:
        return Outcome(reason="image_unavailable", detail="not an http or https url")
    try:
        private = not allow_private and not is_public(host)
    except ValueError:  # a name: the resolver looks at it
        private = False
    return Outcome(reason="private_address", detail="a private address") if private else parsed


def opted_out(headers: Mapping[str, str], directives: Sequence[str], robot_name: str) -> str:
    """The directive by which a site refuses this use, or "". A directive may be addressed to one robot by its name.

    https://developers.google.com/search/docs/crawling-indexing/robots-meta-tag, https://www.w3.org/community/tdmrep
    """
    if not directives:
        return ""
    values = (
        headers.getall("X-Robots-Tag", ())
        if hasattr(headers, "getall")
        else [headers.get("X-Robots-Tag", "")]
    )
    for value in values:
        name, colon, rest = value.partition(":")
        if colon and "," not in name and name.strip().lower() != robot_name.lower():
            continue
        for directive in (rest if colon and "," not in name else value).split(","):
            if directive.strip().lower() in directives:
                return directive.strip().lower()
    return "tdm-reservation" if headers.get("tdm-reservation", "").strip() == "1" else ""


class Fetcher:
    """A client session with limits; use as an async context manager."""

    def __init__(self, options: FetchOptions, resolver: AbstractResolver | None = None):
        """`resolver` defaults to one without private addresses, unless these are allowed."""
        self.options = options
        self._resolver = resolver or (None if options.allow_private else PublicResolver())
        self.bytes_received = 0
        self._slots = asyncio.Semaphore(options.concurrency)

    async def __aenter__(self) -> Self:
        options = self.options
        connector = aiohttp.TCPConnector(
            limit=0,  # the semaphores here count, so that a slow host holds none of the others up
            resolver=self._resolver,
            ttl_dns_cache=300,
        )
        self._session = aiohttp.ClientSession(
            connector=connector,
            timeout=aiohttp.ClientTimeout(total=options.timeout_s),
            headers={"User-Agent": options.user_agent, "Accept": "image/*", "Accept-Encoding": "identity"},
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,  # a proxy would resolve names itself, past the check
        )
        return self

    async def __aexit__(self, *_: Any) -> None:
        await self._session.close()

    async def fetch(self, url: str) -> Outcome:
        """Try until it works, is hopeless, or the retries are used up. Never raises for what a server does."""
        for attempt in range(self.options.retries + 1):
            async with self._slots:
                outcome = await self._try(url)
            if outcome.wait_s is None or attempt == self.options.retries:
                return outcome
            wait = max(outcome.wait_s, self.options.backoff_s * 2**attempt)
            await asyncio.sleep(wait * (1 + random.random() / 2))
        raise AssertionError("unreachable")

    async def _try(self, url: str) -> Outcome:
        try:
            return await self._follow(url)
        except TimeoutError:
            return Outcome(reason="image_unavailable", detail="timeout", wait_s=0)
        except aiohttp.ClientConnectorDNSError as error:
            if isinstance(error.os_error, PrivateAddress):
                return Outcome(reason="private_address", detail="a private address")
            return Outcome(reason="image_unavailable", detail="no such host", wait_s=0)
        except aiohttp.ClientSSLError:
            return Outcome(reason="image_unavailable", detail="bad certificate")
        except aiohttp.ClientPayloadError:
            return Outcome(reason="image_unavailable", detail="ended early", wait_s=0)
        except aiohttp.InvalidURL:
            return Outcome(reason="image_unavailable", detail="not a url")
        except (aiohttp.ClientError, OSError):
            return Outcome(reason="image_unavailable", detail="no connection", wait_s=0)
        except ValueError:  # a host name that cannot be encoded (IDNA), a redirect to no url
            return Outcome(reason="image_unavailable", detail="not a url")

    async def _follow(self, url: str) -> Outcome:
        deadline = time.monotonic() + self.options.timeout_s
        target = url
        for _ in range(MAX_REDIRECTS + 1):
            checked = check_url(target, self.options.allow_private)
            if isinstance(checked, Outcome):
                return checked
            left = aiohttp.ClientTimeout(total=max(0.01, deadline - time.monotonic()))
            async with self._session.get(checked, allow_redirects=False, timeout=left) as response:
                if response.status in (301, 302, 303, 307, 308) and "Location" in response.headers:
                    target = str(checked.join(URL(response.headers["Location"])))
                    continue
                return await self._read(response)
        return Outcome(reason="image_unavailable", detail="too many redirects")

    async def _read(self, response: aiohttp.ClientResponse) -> Outcome:
        options = self.options
        if response.status != 200:
            wait = _retry_after(response.headers) if response.status in _RETRY_STATUS else None
            return Outcome(reason="image_unavailable", detail=f"HTTP {response.status}", wait_s=wait)
        if directive := opted_out(response.headers, options.opt_out, options.robot_name):
            return Outcome(reason="opted_out", detail=directive)
        data = bytearray()
        if (response.content_length or 0) > options.max_bytes:
            return Outcome(reason="image_too_large", detail=f"over {options.max_bytes} bytes")
        async for chunk in response.content.iter_chunked(1 << 16):
            self.bytes_received += len(chunk)
            data += chunk
            if len(data) > options.max_bytes:
                return Outcome(reason="image_too_large", detail=f"over {options.max_bytes} bytes")
            if len(data) >= 64 and not sniff(data[:64]):  # a page that says "not found", or an endless stream
                return Outcome(reason="not_an_image", detail="no image in the answer")
        if not sniff(bytes(data[:64])):
            return Outcome(reason="not_an_image", detail="no image in the answer")
        return Outcome(bytes(data))


def _retry_after(headers: Mapping[str, str], longest_s: float = 60.0) -> float:
    """Seconds that the server asks for, 0 if it does not, at most a minute."""
    value = headers.get("Retry-After", "").strip()
    if value.isdecimal():
        return min(float(value), longest_s)
    try:
        wait = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
    except ValueError:
        return 0.0
    return min(max(wait, 0.0), longest_s)
