# SPDX-License-Identifier: Apache-2.0
"""Loads typed resources from text, files or parsed objects.

Invariants: loading does not stop at the first problem.  `LoadResult.problems` has all problems of the whole input, in
the order of files and lines.  `LoadResult.resources` has only valid objects, in the order of the input.  A caller that
must not use a part of an invalid input calls `LoadResult.check`.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any

from netpol_ebpf.errors import Location, Problem, ValidationError
from netpol_ebpf.resources import calico, calico_configuration, calico_storage, core, kubernetes, signetwork, workloads
from netpol_ebpf.resources.foreign import find_slip, group_of, is_policy
from netpol_ebpf.resources.kind import Kind
from netpol_ebpf.resources.manifest_files import find_manifests, read_regular
from netpol_ebpf.resources.reader import ProblemReport, Reader, describe, suggestion
from netpol_ebpf.resources.sharing import share_text, share_texts
from netpol_ebpf.resources.syntax import check_annotations, check_dns_label, check_label
from netpol_ebpf.resources.types import Meta, Resource
from netpol_ebpf.resources.yamltree import Path, Positions, read_documents

STANDARD_INPUT = FilePath("-")

KINDS: dict[tuple[str, str], Kind] = {
    (kind.api_version, kind.kind): kind
    for module in (core, kubernetes, calico, calico_configuration, signetwork, calico_storage)
    for kind in module.KINDS
}

WORKLOADS: dict[tuple[str, str], Kind] = {(kind.api_version, kind.kind): kind for kind in workloads.KINDS}
"""Kinds with a pod template. Only commands without a cluster read them, because in a cluster their pods exist."""

KUSTOMIZATION = ("kustomize.config.k8s.io/v1beta1", "Kustomization")

SERVICE_ACCOUNT_LABEL = "projectcalico.org/serviceaccount"

_META_FIELDS = ("name", "namespace", "labels", "annotations")
_META_WRITTEN_BY_SERVER = (
    "uid",
    "resourceVersion",
    "generation",
    "creationTimestamp",
    "deletionTimestamp",
    "deletionGracePeriodSeconds",
    "generateName",
    "finalizers",
    "managedFields",
    "ownerReferences",
    "selfLink",
)


@dataclass(frozen=True, slots=True)
class LoadResult:
    """The valid resources, and all problems (errors and warnings).

    ``documents``: the number of non-empty documents.
    ``skipped``: by "apiVersion kind", the number of objects of kinds that are not read.
    """

    resources: list[Resource]
    problems: list[Problem]
    documents: int = 0
    skipped: Mapping[str, int] = field(default_factory=dict)

    @property
    def errors(self) -> list[Problem]:
        """The problems that make the input invalid."""
        return [problem for problem in self.problems if problem.severity == "error"]

    def check(self) -> list[Resource]:
        """Return the resources. Raises ValidationError with all errors if there are any."""
        if errors := self.errors:
            raise ValidationError(errors)
        return self.resources


def parse_documents(text: str, file: str) -> LoadResult:
    """Parse a YAML or JSON text of one or more documents. ``file``: the file name for locations.

    This function is for the agent.  It skips workloads such as Deployments, which the other functions of this module
    read.
    """
    loader = _Loader(workloads=False)
    loader.text(text, file)
    return loader.result()


def parse_object(obj: Mapping[str, Any], file: str, positions: Positions | None = None) -> LoadResult:
    """Parse one object that was already decoded from YAML or JSON.

    If the object is a List, its items are parsed.
    ``positions``: the positions of the parts of ``obj``, as from ``Document.positions.child(path)``.  Without them
    locations have only the file.
    """
    return parse_objects([(obj, positions or Positions(file))])


def parse_objects(objects: Iterable[tuple[Any, Positions]], *, lenient: bool = False) -> LoadResult:
    """Parse objects that were already decoded from YAML or JSON, with their positions.

    Duplicates are errors.
    ``lenient``: True for objects that no API server has checked, such as those of case files.  Then names, labels and
    sizes that an API server would reject are warnings instead of errors.
    """
    loader = _Loader(lenient=lenient)
    for obj, positions in objects:
        loader.value(obj, (), positions)
    return loader.result()


def load_paths(paths: Sequence[FilePath]) -> LoadResult:
    """Load all objects of files and directories. The path ``-`` is standard input.

    Directories are searched recursively for *.yaml, *.yml and *.json, without hidden files and directories.
    """
    loader = _Loader()
    for path in _files([path for path in paths if path != STANDARD_INPUT], loader):
        loader.file(path)
    if STANDARD_INPUT in paths:
        loader.data(sys.stdin.buffer.read(), "<stdin>")
    return loader.result()


def _files(paths: Sequence[FilePath], loader: _Loader) -> list[FilePath]:
    """The files to read, each once, in the order of ``paths``. The files of a directory are sorted."""
    found: dict[FilePath, FilePath] = {}
    for path in paths:
        try:
            if path.is_dir():
                candidates = _files_below(path, loader)
            elif path.exists():
                candidates = [path]
            else:
                loader.problems.append(Problem(Location(str(path)), "", "no such file or directory", slug="file"))
                continue
            for file in candidates:
                found.setdefault(file.resolve(), file)
        except (OSError, ValueError, RuntimeError) as error:  # no permission, a NUL in the path, a loop of links
            loader.problems.append(Problem(Location(str(path)), "", f"cannot be read: {error}", slug="file"))
    return list(found.values())


def _files_below(top: FilePath, loader: _Loader) -> list[FilePath]:
    """The manifests below a directory, sorted. A manifest that cannot be read is recorded as a problem.

    Raises OSError if the directory itself cannot be read.
    """
    names, refused = find_manifests(top).readable()
    for name, reason in refused.items():
        loader.problems.append(Problem(Location(str(top / name)), "", f"cannot be read: {reason}", slug="file"))
    return sorted(top / name for name in names)


class _Loader:
    """Collects resources and problems over all inputs of one call."""

    def __init__(self, *, lenient: bool = False, workloads: bool = True) -> None:
        self.lenient = lenient
        self._kinds = KINDS | WORKLOADS if workloads else KINDS
        self.resources: list[Resource] = []
        self.problems: list[Problem] = []
        self._documents = 0
        self._skipped: Counter[str] = Counter()
        self._files: dict[str, int] = {}
        self._seen: dict[tuple[str, str, str, str], Location] = {}

    def result(self) -> LoadResult:
        """All resources and problems, the problems in the order of files and lines."""
        order = self._files
        self.problems.sort(key=lambda problem: (order.get(problem.location.file, -1), problem.location.line))
        resources = calico_storage.without_stored_copies(self.resources)
        return LoadResult(resources, self.problems, self._documents, dict(sorted(self._skipped.items())))

    def file(self, path: FilePath) -> None:
        name = str(path)
        try:
            # A path on the command line may be a pipe of the shell; then reading must wait for data.
            data = read_regular(path) if path.is_file() else path.read_bytes()
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            self.problems.append(Problem(Location(name), "", f"cannot be read: {reason}", slug="file"))
            return
        self.data(data, name)

    def data(self, data: bytes, name: str) -> None:
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            message = f"not UTF-8 text: byte 0x{data[error.start]:02x}; save the file as UTF-8"
            self._order(name)
            self.problems.append(Problem(Location(name, line), "", message, slug="encoding"))
            return
        self.text(text, name)

    def _order(self, file: str) -> None:
        self._files.setdefault(file, len(self._files))

    def text(self, text: str, file: str) -> None:
        self._order(file)
        for document in read_documents(text, file, self.problems):
            self._documents += 1
            self.value(document.value, (), document.positions)

    def value(self, value: Any, path: Path, positions: Positions, default: tuple[str, str] = ("", "")) -> None:
        """Read one object, or the items of a List.

        ``default``: apiVersion and kind of items that do not state them, in a typed List such as PodList.
        """
        self._order(positions.file)
        if isinstance(value, (list, tuple)):  # calicoctl reads and writes several objects in this form
            for index, item in enumerate(value):
                self.value(item, (*path, index), positions)
            return
        report = ProblemReport(positions.child(path), problems=self.problems, lenient=self.lenient)
        if not isinstance(value, Mapping):
            report.error(
                (),
                f"must be a Kubernetes object (a mapping with apiVersion and kind), is {describe(value)}",
                slug="type",
            )
            return
        if _is_case_file(value):
            message = "is a case file, not a manifest: `netpolctl test` runs it, and validates the manifests in it"
            report.error((), message, slug="case-file")
            return
        if _is_kustomization(value, positions.file):
            self._skipped[f"{KUSTOMIZATION[0]} {KUSTOMIZATION[1]}"] += 1
            return
        obj = Reader(value, (), report)
        api_version, kind_name = obj.string("apiVersion") or default[0], obj.string("kind") or default[1]
        if kind_name.endswith("List") and ("items" in value or kind_name == "List"):
            implied = (api_version, kind_name[: -len("List")]) if kind_name != "List" else ("", "")
            for index, item in enumerate(obj.list("items")):
                self.value(item, (*path, "items", index), positions, implied)
            return
        if report.failed or not _is_typed(obj, api_version, kind_name):
            return
        kind = self._kinds.get((api_version, kind_name))
        if kind is None:
            report.obj = _object_name(kind_name, _meta_text(value, "namespace"), _meta_text(value, "name"))
            self._skip(obj, api_version, kind_name)
            return
        resource = _parse(kind, obj)
        if resource is not None and self._is_first(kind, resource):
            self.resources.append(resource)

    def _skip(self, obj: Reader, api_version: str, kind: str) -> None:
        """Count an object of a kind that is not read.

        If the kind is misspelt, or is a policy that is not enforced, a problem is recorded.
        """
        stored = group_of(api_version) == group_of(calico_storage.VERSION)
        slip = find_slip(api_version, kind, [key for key, one in KINDS.items() if stored or not one.is_stored])
        if slip is not None:
            obj.error(*slip, slug="unknown-kind")
            return
        self._skipped[f"{api_version} {kind}"] += 1
        if is_policy(kind):
            message = f"a {kind} of {api_version} is not enforced here; nothing of it is in force"
            obj.warning(None, message, slug="not-enforced")

    def _is_first(self, kind: Kind, resource: Resource) -> bool:
        """Record the object. If the same object was given before, a problem is recorded and the result is False."""
        meta = resource.meta
        key = (kind.api_version.rpartition("/")[0], kind.kind, meta.namespace, meta.name)
        first = self._seen.setdefault(key, meta.location)
        if first is meta.location:
            return True
        name = _object_name(kind.kind, meta.namespace, meta.name)
        message = f"the same object is given twice: first at {first}, again here; remove one of them"
        self.problems.append(Problem(meta.location, "", message, obj=name, slug="duplicate"))
        return False


def _parse(kind: Kind, obj: Reader) -> Resource | None:
    report = obj.report
    report.obj = kind.kind
    meta = _metadata(kind, obj)
    resource = kind.parse(obj, meta)
    if kind.strict:
        obj.ignore("apiVersion", "kind", "metadata", "status")
        obj.done({"selector": "unknown field `selector`; it belongs inside `spec:`"})
    return None if report.failed else resource


def _metadata(kind: Kind, obj: Reader) -> Meta:
    location = obj.report.location(())
    metadata = obj.mapping("metadata")
    if metadata is None:
        if not obj.has("metadata"):
            obj.missing("metadata")
        return Meta("", "", {}, location)
    report = obj.report
    name = metadata.required_string("name")
    namespace = metadata.string("namespace") or ""
    kept = calico_storage.kept_metadata(metadata) if kind.is_stored else {}
    stored_name = ""
    if kind.is_stored:
        restored = calico_storage.restored_name(kind.kind, name, kept)
        stored_name = name if restored != name and not kept.get("name") else ""
        name = restored
    report.obj = _object_name(kind.kind, (namespace or "default") if kind.namespaced else "", name)
    if name and (message := kind.check_name(name)) is not None:
        metadata.error("name", message, slug="name")
    if not kind.namespaced:
        if namespace:
            metadata.warning(
                "namespace", f"a {kind.kind} belongs to no namespace; this field has no effect", slug="inert-namespace"
            )
        namespace = ""
    else:
        namespace = namespace or "default"
        if kind.strict and (message := check_dns_label(namespace)) is not None:
            metadata.error("namespace", message, slug="name")
    labels = calico_storage.restored_labels(
        metadata.string_map("labels", _check_meta_label if kind.strict else None), kept
    )
    annotations = metadata.string_map("annotations")
    if kind.strict and (message := check_annotations(annotations)) is not None:
        metadata.error("annotations", message, slug="annotation")
    _check_meta_fields(kind, metadata)
    revision = _revision(metadata) if kind.strict else ""
    return Meta(name, share_text(namespace), share_texts(labels), location, kind.is_stored, stored_name, revision)


def _revision(metadata: Reader) -> str:
    """The revision of a policy (`Meta.revision`).

    It consists of uid and generation, which an API server sets. In a manifest, any value of these two is allowed; if
    the values do not make a revision, the result is "".
    """
    uid, generation = metadata.raw("uid"), metadata.raw("generation")
    is_given = isinstance(uid, str) and uid and isinstance(generation, int) and not isinstance(generation, bool)
    return f"{uid}/{generation}" if is_given and generation > 0 else ""


def _check_meta_label(key: str, value: str) -> str | None:
    """Check a label. Returns the fault, or None.

    The label with a service account's name may be longer than others, because the name may be longer.
    """
    return None if key == SERVICE_ACCOUNT_LABEL else check_label(key, value)


def _check_meta_fields(kind: Kind, metadata: Reader) -> None:
    """Check unknown fields of metadata.

    In policies they are errors, in other objects only if they are probably misspelt.
    """
    metadata.ignore(*_META_WRITTEN_BY_SERVER)
    if kind.strict:
        metadata.done()
        return
    for key in metadata.fields():
        if key not in _META_FIELDS and key not in _META_WRITTEN_BY_SERVER and (near := suggestion(key, _META_FIELDS)):
            metadata.error(key, f"unknown field `{key}`{near}", slug="unknown-field")


def _object_name(kind: str, namespace: str, name: str) -> str:
    return "/".join(part for part in (kind, namespace, name) if part)


def _meta_text(value: Mapping[str, Any], key: str) -> str:
    """A text field of the metadata of an object of an unknown kind; "" if it is not a text."""
    metadata = value.get("metadata")
    text = metadata.get(key) if isinstance(metadata, Mapping) else None
    return text if isinstance(text, str) else ""


def _is_case_file(value: Mapping[str, Any]) -> bool:
    """Whether a document is a case file, by its top-level fields, which no object of an API server has."""
    return "apiVersion" not in value and "kind" not in value and "manifests" in value and "probes" in value


def _is_kustomization(value: Mapping[str, Any], file: str) -> bool:
    """Whether a document is a kustomization, which may lack its apiVersion and kind."""
    return "apiVersion" not in value and "kind" not in value and FilePath(file).stem == "kustomization"


def _is_typed(obj: Reader, api_version: str, kind: str) -> bool:
    if api_version and kind:
        return True
    for key, value in (("apiVersion", api_version), ("kind", kind)):
        if not value:
            obj.missing(key)
    return False
