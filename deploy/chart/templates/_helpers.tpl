{{- /* SPDX-License-Identifier: Apache-2.0 */ -}}

{{- /*
Names of pods' interfaces on the node, by network. No interface of the node itself may have such a name.
docs/beside-NAME.md has the reason for each.
*/ -}}
{{- define "netpol.barrierInterfaces" -}}
flannel: ["veth*"]
calico: ["cali*"]
aws-vpc: ["eni*"]
kindnet: ["veth*", "knet*"]
other: []
{{- end -}}

{{- /* The agent's configuration file: what the chart sets, and over it the value `config`. */ -}}
{{- define "netpol.config" -}}
{{- $file := dict "apiVersion" "netpol-ebpf/v1alpha1" "kind" "NodeConfiguration" "kubernetes" true -}}
{{- with get (include "netpol.barrierInterfaces" . | fromYaml) .Values.network -}}
{{- $_ := set $file "barrierInterfaces" . -}}
{{- end -}}
{{- if eq .Values.health.address "loopback" -}}
{{- $_ := set $file "healthAddress" (printf "127.0.0.1:%v" .Values.health.port) -}}
{{- end -}}
{{- mergeOverwrite $file .Values.config | toYaml -}}
{{- end -}}

{{- /* A page of the agent's health server, for kubelet. Without a host kubelet takes the pod's address, which is the node's. */ -}}
{{- define "netpol.probe" -}}
{{- $values := (index . 0).Values -}}
{{- $page := dict "path" (index . 1) "port" $values.health.port -}}
{{- if eq $values.health.address "loopback" -}}
{{- $_ := set $page "host" "127.0.0.1" -}}
{{- end -}}
{{- toJson $page -}}
{{- end -}}

{{- define "netpol.labels" -}}
app.kubernetes.io/name: netpol-ebpf
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
{{- end -}}

{{- /* The part of a pod that needs the node: every node, whatever its taints, and the means to pin. */ -}}
{{- define "netpol.nodePod" -}}
# The node's interfaces and tables are those of its network namespace. The CNI plugin does not wait for pods that are in it.
hostNetwork: true
# Otherwise a Service named netpol-ebpf-NAME would set variables that begin as those of the agent's options do.
enableServiceLinks: false
priorityClassName: system-node-critical
nodeSelector: {kubernetes.io/os: linux}
tolerations: [{operator: Exists}]
{{- with .Values.imagePullSecrets }}
imagePullSecrets: {{ toJson . }}
{{- end }}
securityContext:
  # The runtimes' AppArmor profile denies writes below /sys/fs, so no pin could be made, and SELinux denies them to container_t. The
  # seccomp profile of some runtimes knows bpf(2) only with CAP_SYS_ADMIN.
  appArmorProfile: {type: Unconfined}
  seccompProfile: {type: Unconfined}
  seLinuxOptions: {type: spc_t}
{{- end -}}

{{- /* The three capabilities of docs/agent.md. They suffice for the agent and for netpolctl cleanup. */ -}}
{{- define "netpol.threeCapabilities" -}}
runAsUser: 0
readOnlyRootFilesystem: true
allowPrivilegeEscalation: false
capabilities: {drop: [ALL], add: [BPF, NET_ADMIN, PERFMON]}
{{- end -}}
