-- Health of a MoEModel for Argo CD: resource.customizations.health.faasmoe.dev_MoEModel in the ConfigMap argocd-cm.
-- `Ready` follows what users can do, so an idle model is Healthy and a lost sandbox changes nothing.
local function condition(kind)
  for _, found in ipairs((obj.status or {}).conditions or {}) do
    if found.type == kind then
      return found
    end
  end
end

local status = obj.status or {}
local ready = condition("Ready")
if ready == nil or (status.observedGeneration or 0) < (obj.metadata.generation or 0) then
  return { status = "Progressing", message = "waiting for the FaaSMoE operator" }
end
if ready.reason == "Suspended" then
  return { status = "Suspended", message = ready.message }
end
local health = { True = "Healthy", False = "Degraded", Unknown = "Progressing" }
return { status = health[ready.status] or "Unknown", message = ready.message }
